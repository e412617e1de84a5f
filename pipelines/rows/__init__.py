"""Steps that rows go through in a build, as functions on Arrow tables."""
