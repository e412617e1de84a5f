"""Teachers that score every training row before the fit begins, and where their scores are kept."""
