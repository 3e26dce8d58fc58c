"""What a project's run is doing, from the files that its stages and Snakemake write."""

from ms4_wizard.watch.cli import main

__all__ = ["main"]
