"""Metrics of rounds, clients and partitions."""
