"""The embedded way to call a servable."""
