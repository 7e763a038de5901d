"""Flower: the in-process grid and the two shells."""
