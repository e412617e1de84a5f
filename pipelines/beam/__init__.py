"""The Beam pipelines of a build and of bulk scoring: the only room that imports Beam."""
