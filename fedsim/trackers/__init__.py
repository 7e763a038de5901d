"""Who else is told of a run: experiment trackers. The run folder stays the truth."""
