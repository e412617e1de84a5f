"""Commands and the Beam graph. ``python -m pipelines.<command> --help`` explains each."""
