"""Engines: how a cohort is trained."""
