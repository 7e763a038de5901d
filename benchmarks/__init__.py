"""Benchmarks: `python -m benchmarks B1 B4 --json FILE`. They report; they never fail a test run."""
