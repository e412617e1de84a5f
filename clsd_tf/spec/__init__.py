"""What a data set contains, declared in YAML: types and rules, no TensorFlow."""
