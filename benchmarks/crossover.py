"""B8: where the gap to Flower's Ray simulation closes, as compute per client grows."""

from __future__ import annotations

from typing import Any

from benchmarks import harness, workloads
from benchmarks.loops import TightLoop
from benchmarks.peer import peers_of
from benchmarks.training import check, engine_side, threaded
from fedsim.engine.auto import make_engine

DEEP = 1e-2  # relative, of mean updates: eighteen layers of another thread count's and layout's rounding; 2e-3 seen


def b8(options: harness.Options) -> dict[str, Any]:
    """Race `auto` with Flower on one model after another."""
    result: dict[str, Any] = {
        "title": "cohort 10 of 20 images 3x32x32, batch 10: auto over Flower's Ray simulation, by model", "ratios": {},
        "figures": {}, "seconds": {}, "plans": {}, "left_out": {},
    }  # fmt: skip
    for name in workloads.MODELS:
        _model(name, result, options)
    return result


def _model(name: str, result: dict[str, Any], options: harness.Options) -> None:
    work = workloads.b8(name)
    wanted = {f"flower {name}": ("flower", "flower_sim.py")}
    with peers_of(work, options, wanted) as (others, left_out):
        result["left_out"] |= left_out
        if not others:
            return
        engine, why = make_engine(work.task(), "auto", cohort=work.cohort, threads=options.threads)
        side = threaded(engine_side(engine, work), options.threads)
        try:
            check({"tight_loop": TightLoop(work), "auto": side}, others, bound=DEEP)
            sides = {f"auto {name}": side, **others}
            part = harness.compare(sides, [tuple(sides)], options, warm=1, least=3, most=7)
        finally:
            engine.close()
    result["plans"][f"auto {name}"] = {**engine.plan, "why": why}
    for key in ("ratios", "figures", "seconds"):
        result[key] |= part[key]
