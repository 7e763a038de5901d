"""B1, B2, B4 and the overhead of a round: the engines against loops without a framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness, workloads
from benchmarks.loops import HandLoop, Limit, TightLoop
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.task import Engine, Task
from fedsim.engine.vectorized import Vectorized

# "a/b" is the speed of a over the speed of b; over the limit it is a share.
PAIRS = [
    ("vectorized", "limit"), ("vectorized", "tight_loop"), ("vectorized", "hand_loop"), ("sequential", "limit"),
    ("sequential", "tight_loop"),
]  # fmt: skip


def b1() -> dict[str, Any]:
    """Convolutions: the field's headline benchmark."""
    return _compare(workloads.b1(), hand=False, engines=("sequential",), rounds=7, limit_batch=50)


def b2() -> dict[str, Any]:
    """Small clients of logistic regression."""
    return _compare(workloads.b2(), hand=False)


def b4() -> dict[str, Any]:
    """Dense layers, where batching clients pays on a CPU too."""
    return _compare(workloads.b4(), hand=True)


def overhead() -> dict[str, Any]:
    """Microseconds a client that an engine's round takes beyond the tight loop's, at cohort 1000."""
    work = workloads.overhead()
    result = _compare(work, hand=False)
    for name in ("sequential", "vectorized"):
        beyond = result["figures"][name]["median_ms"] - result["figures"]["tight_loop"]["median_ms"]
        result["figures"][name]["us_a_client_beyond_tight_loop"] = 1e3 * beyond / work.cohort
    return result


def _compare(
    work: workloads.Workload,
    *,
    hand: bool,
    engines: tuple[str, ...] = ("sequential", "vectorized"),
    rounds: int = 9,
    limit_batch: int = 500,
) -> dict[str, Any]:
    kinds: dict[str, Callable[[Task], Engine]] = {"sequential": Sequential, "vectorized": Vectorized}
    cores = torch.get_num_threads()
    sides: dict[str, harness.Side] = {"tight_loop": TightLoop(work), "limit": Limit(work, limit_batch)}
    if hand:
        sides["hand_loop"] = HandLoop(work)
    plans = {}
    for name in engines:
        engine = kinds[name](work.task())
        trainer = Trainer(engine)
        plans[name] = dict(engine.plan)

        def round(number: int, trainer: Trainer = trainer) -> torch.Tensor:
            cohort, _ = trainer.stream(work.job(number), lambda cohort: cohort.weights)
            assert cohort.streamed is not None
            return cohort.streamed.mean

        sides[name] = round
    exact = sides["tight_loop"](1)
    differences = {
        name: float((side(1) - exact).norm() / exact.norm()) for name, side in sides.items() if name != "limit"
    }
    if max(differences.values()) > 1e-3:
        raise RuntimeError(f"{work.name}: the sides do not compute the same update: {differences}")
    seconds = harness.race(sides, rounds=rounds)
    return {
        "ratios": harness.ratios(seconds, PAIRS), "figures": harness.figures(seconds), "plans": plans,
        "relative_difference_to_tight_loop": differences, "threads": cores,
    }  # fmt: skip
