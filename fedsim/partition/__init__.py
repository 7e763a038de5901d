"""Partitions of data over clients."""
