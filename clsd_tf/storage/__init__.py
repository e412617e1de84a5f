"""The directories that couple the jobs: the only rooms that know file names. No TensorFlow."""
