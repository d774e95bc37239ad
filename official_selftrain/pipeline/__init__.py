"""What a command does: stages of a run, from data to report."""
