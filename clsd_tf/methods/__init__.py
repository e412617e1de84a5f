"""Ways to learn from clicks: one folder each, behind the contract in ``method``."""
