"""Training: the loop, its state, its metrics."""
