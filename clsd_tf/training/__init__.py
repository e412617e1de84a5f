"""A training run: config, model, teacher, fit, checkpoints, calibration."""
