"""What the wizard's screens are made of."""
