"""The terminal wizard that writes an ms4 project."""
