"""Mergeable summaries of columns, checks made on them, and their page."""
