"""What a study is made of: its YAML files, their checks, and the data sets they need."""
