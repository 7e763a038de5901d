"""Server rules, one file an algorithm."""
