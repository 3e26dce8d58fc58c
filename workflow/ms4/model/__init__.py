"""The transformers model over packed weights: experts, attention, adapters, loss."""
