"""One row, one click or none, one probability: what ``bce`` is, and what other methods of rows begin with."""
