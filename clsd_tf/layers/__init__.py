"""Embeddings, losses and calibration: parts that know no model."""
