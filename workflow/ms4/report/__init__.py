"""What a run hands over: report, model card, record of the run, and the table in the terminal."""
