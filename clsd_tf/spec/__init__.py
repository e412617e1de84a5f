"""Declarations of what a data set contains, as YAML holds them: types and rules, no TensorFlow."""
