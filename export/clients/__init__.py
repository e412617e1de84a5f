"""Clients of a model server, this project's or TF Serving."""
