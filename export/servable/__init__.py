"""What a SavedModel is made of, and the files beside it."""
