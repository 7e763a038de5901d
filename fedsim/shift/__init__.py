"""Data that change while clients train: whose samples are replaced when, and by what."""
