"""Benchmarks: python -m benchmarks [ids …]; see docs/benchmarks.md."""

import fedsim  # noqa: F401  before torch, whose idle threads it sends to sleep
