"""Settings of optimizers, the rules by which rows of tables move, and the optimizer that moves them."""
