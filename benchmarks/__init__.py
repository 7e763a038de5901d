"""Benchmarks: `python -m benchmarks B1 B4 --json FILE`. They report; they never fail a test run."""

import fedsim  # noqa: F401  before torch, whose idle threads it sends to sleep
