"""Weights: fetched from a hub or a directory, turned into the base, verified."""
