"""Processes and Ray actors side by side, and against the engine of one process, on B1."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import harness, workloads
from benchmarks.training import engine_side
from fedsim.engine.auto import make_engine
from fedsim.errors import UserError

PAIRS = (("ray", "processes"), ("processes", "sequential"))


def workers(options: harness.Options) -> dict[str, Any]:
    """Race two actors, two processes and one process, all on the sequential engine; the sums must agree."""
    work = workloads.b1()
    engines: dict[str, Any] = {}
    ready, plans, left_out = {}, {}, {}
    for name in ("sequential", "processes", "ray"):
        # The same engine everywhere, so that all three do the same products.
        arguments = {} if name == "sequential" else {"workers": options.threads, "inner": "sequential"}
        began = time.perf_counter()
        try:
            engine, _ = make_engine(work.task(), name, cohort=work.cohort, threads=options.threads, **arguments)
        except UserError as error:
            left_out[name] = str(error)
            continue
        engines[name], plans[name] = engine_side(engine, work), dict(engine.plan)
        engines[name](1)
        ready[name] = time.perf_counter() - began
        plans[name]["close"] = engine.close
    torch.set_num_threads(options.threads)
    sums = [side(1) for side in engines.values()]
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-3, atol=1e-6)
    try:
        result = harness.compare(engines, PAIRS, options, warm=1, budget=60.0)
    finally:
        for plan in plans.values():
            plan.pop("close")()
    for name, seconds in ready.items():
        result["figures"][name]["first_round_s"] = seconds
    return {
        "title": f"B1 on {options.threads} workers and in one process", "plans": plans, "left_out": left_out, **result
    }  # fmt: skip
