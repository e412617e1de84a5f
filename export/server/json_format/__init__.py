"""JSON of TF Serving: requests to tensors, tensors to answers."""
