"""Versions of a model: numbers that are never used twice, labels, roll back, deletion."""
