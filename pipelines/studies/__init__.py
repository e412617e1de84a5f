"""The parts of a study: its YAML files, their checks, and the data sets they need."""
