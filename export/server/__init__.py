"""A small server for development and tests that speaks TF Serving's protocols; not a replacement for TF Serving."""
