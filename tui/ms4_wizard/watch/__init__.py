"""What a project's run is doing, from the files that its stages and Snakemake write."""
