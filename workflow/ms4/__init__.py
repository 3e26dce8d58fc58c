"""ms4: fine-tune Mistral Small 4 on the hardware you have."""

__version__ = "0.1.0"
