"""Public and simulated data sets."""
