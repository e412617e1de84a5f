"""What happens to rows, as functions on Arrow tables."""
