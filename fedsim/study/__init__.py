"""Experiments: claims whose criterion is written down before they are run, and what came of them."""
