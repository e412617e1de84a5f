"""Calling a server, ours or TF Serving."""
