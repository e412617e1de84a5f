"""Parts of a SavedModel, and the files beside it."""
