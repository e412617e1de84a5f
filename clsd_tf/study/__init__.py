"""Cells of a study, and its tables."""
