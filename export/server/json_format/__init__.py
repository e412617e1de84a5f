"""TF Serving's JSON: requests to tensors, tensors to answers."""
