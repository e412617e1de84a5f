"""A feature spec guessed from files that nobody prepared."""
