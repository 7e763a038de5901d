"""Client objectives, one file an algorithm."""
