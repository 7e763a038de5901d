"""Sweeps: many runs on warm worker processes, one table of results, and tuning that is fair to every method."""
