"""One way to measure scored rows, and its page."""
