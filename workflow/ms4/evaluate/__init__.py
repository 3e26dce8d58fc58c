"""Evaluation of the untuned against the tuned model."""
