"""Start, reports, failure and interruption of commands, and the loading of a user's own modules."""
