"""Offline metrics, tests of differences and errors over users: NumPy only."""
