"""B1 to B4 and the overhead of a round: the engines against loops without a framework, and other frameworks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import harness, workloads
from benchmarks.loops import HandLoop, Limit, TightLoop
from benchmarks.peer import Peer, peers_of
from benchmarks.rounds import WholeRound
from benchmarks.whole import whole_runs
from fedsim.engine import chunk
from fedsim.engine.auto import make_engine
from fedsim.engine.precision import emulated
from fedsim.engine.rounds import Trainer
from fedsim.engine.task import Engine
from fedsim.models.logreg import logreg
from fedsim.models.parameters import initialise

# "a/b" is the speed of a over the speed of b; over the limit it is a share.
AGAINST = ("tight_loop", "hand_loop", "limit")
ENGINES = ("sequential", "vectorized", "auto")  # `vectorized` with the kernels that it takes by itself
KERNELS, PRECISIONS = ("captured", "fused", "generic"), ("bf16", "tf32")  # "vectorized fused", "sequential bf16"
TOLERANCE = 1e-3  # relative, of mean updates in float32; sides differ by 2e-5
# The same on B3, where one client of 100 is ill-conditioned: 1e-7 more or less in its start moves its update by 4e-2 on
# any engine (by 1e-5 otherwise). In float64 its engines agree to 1e-14.
UNSTABLE = 1e-2
ROUNDED = 0.5  # the same with products in bfloat16, over random labels, where clients' updates hardly agree


def b1(options: harness.Options) -> dict[str, Any]:
    """Convolutions: the field's headline benchmark."""
    engines = ("sequential", "auto")  # batched convolutions are grouped ones: slower on a CPU, and not chosen there
    engines = ENGINES if torch.cuda.is_available() else engines
    slow = emulated("bf16", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    title = "cohort 50 of 50 images 3x32x32, batch 10, 1.63 M parameter CNN"
    peers = {"pfl": ("pfl", "pfl_b1.py")}
    engines = engines if slow else (*engines, "sequential bf16")
    result = compare(workloads.b1(), options, title, engines=engines, limit_batch=50, warm=0, peers=peers)
    result["left_out"] |= {"sequential bf16": slow} if slow else {}
    return result


def b2(options: harness.Options) -> dict[str, Any]:
    """Small clients of logistic regression: a round, and a hundred of them end to end."""
    registered = 1000
    peers = {"flower": ("flower", "flower_sim.py", "--registered", str(registered))}
    run = WholeRound(workloads.b2(registered), cohort=10)
    title = "cohort 10 of 60 images 28x28, batch 10, logistic regression"
    result = compare(workloads.b2(), options, title, peers=peers, run=run, drawn=("flower",))
    run.close()
    return whole_runs(result, options)


def b3(options: harness.Options) -> dict[str, Any]:
    """Unequal clients, and what their inequality costs the vectorized engine."""
    work = workloads.b3()
    title = "cohort 100 of 3400 log-normal clients (16-400 images 28x28, 62 classes)"
    result = compare(work, options, title, engines=("sequential", "auto"), limit_batch=0, warm=0, bound=UNSTABLE)
    result["idle"] = idle(work)
    result["notes"] = [f"the schedule of chunks: {100 * value:.2f} % {name}" for name, value in result["idle"].items()]
    differences = result["relative_difference_to_tight_loop"]
    result["notes"] += [f"{name} differs from the tight loop by {value:.1e}" for name, value in differences.items()]
    return result


def b4(options: harness.Options) -> dict[str, Any]:
    """Dense layers, where batching clients pays on a CPU too."""
    work = workloads.b4()
    peers = {
        "jax": ("jax", "jax_b4.py"), "flower": ("flower", "flower_sim.py"),
        "flower_tutorial": ("flower", "flower_sim.py", "--style", "tutorial"), "fedjax": ("fedjax", "fedjax_b4.py"),
        "fedlab": ("fedlab", "fedlab_b4.py"),
    }  # fmt: skip
    run = WholeRound(work, cohort=work.cohort)
    title = "cohort 100 of 50 samples, batch 10, MLP 784-200-10"
    engines = (*ENGINES, "vectorized fused")
    result = compare(work, options, title, hand=True, engines=engines, peers=peers, run=run)
    run.close()
    return result


def overhead(options: harness.Options) -> dict[str, Any]:
    """Microseconds a client that an engine's round takes beyond the tight loop's, at cohort 1000."""
    work = workloads.overhead()
    result = compare(work, options, "cohort 1000 of 2 samples, logistic regression 64-10")
    for name in ENGINES:
        beyond = result["figures"][name]["median_ms"] - result["figures"]["tight_loop"]["median_ms"]
        result["figures"][name]["us_a_client_beyond_tight_loop"] = 1e3 * beyond / work.cohort
    return result


def compare(  # noqa: PLR0913  a workload and how to race it
    work: workloads.Workload, options: harness.Options, title: str, *, hand: bool = False,
    engines: tuple[str, ...] = ENGINES, limit_batch: int = 500, warm: int = 2,
    peers: Mapping[str, tuple[str, ...]] | None = None, run: WholeRound | None = None, bound: float = TOLERANCE,
    drawn: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """Check that all sides compute the same mean update, but those that draw cohorts of their own; then race them."""
    baselines: dict[str, harness.Side] = {"tight_loop": TightLoop(work)}
    if limit_batch:
        baselines["limit"] = Limit(work, limit_batch)
    if hand:
        baselines["hand_loop"] = HandLoop(work)
    convolves = any(isinstance(module, nn.Conv2d) for module in work.module.modules())
    plans: dict[str, Any] = {}
    sides: dict[str, harness.Side] = {}
    for name, side in baselines.items():
        threads = options.threads if convolves else best_threads(side, options.threads)
        plans[name], sides[name] = {"threads": threads}, threaded(side, threads)
    # One client at a time profits from a second thread where the tight loop does: both do the same products.
    alone = plans["tight_loop"]["threads"]
    aliases, opened = {}, []
    for name in engines:
        kind, _, variant = name.partition(" ")
        task = replace(work.task(), precision=variant if variant in PRECISIONS else "fp32")
        kernels = {"kernels": variant} if variant in KERNELS else {}
        engine, why = make_engine(task, kind, cohort=work.cohort, threads=options.threads, **kernels)
        plan = {**engine.plan, "precision": task.precision}
        twin = next((n for n in sides if plans[n].get("plan") == plan), None)
        plans[name] = {**plan, "plan": plan, "why": why}
        if twin is not None:  # what `auto` took is raced already
            aliases[name] = twin
            engine.close()
            continue
        opened.append(engine)
        sides[name] = threaded(engine_side(engine, work), alone if plan["engine"] == "sequential" else 1)
    with peers_of(work, options, peers or {}) as (others, left_out):
        differences = check(sides, {name: peer for name, peer in others.items() if name not in drawn}, bound)
        raced = {**sides, **({"run": run} if run else {}), **others}
        seconds = harness.race(raced, options, warm=warm)
        plans |= {name: dict(peer.about) for name, peer in others.items()}
        plans |= {"run": dict(run.plan)} if run else {}
    seconds |= {name: seconds[twin] for name, twin in aliases.items()}
    for engine in opened:
        engine.close()
    for plan in plans.values():
        plan.pop("plan", None)
    pairs = [(name, against) for name in (*engines, "run") for against in (*AGAINST, *others)]
    pairs += [(name, name.partition(" ")[0]) for name in engines if " " in name]
    return {
        "title": title, "ratios": harness.ratios(seconds, pairs), "figures": harness.figures(seconds),
        "seconds": seconds, "plans": plans, "same_as": aliases, "relative_difference_to_tight_loop": differences,
        "left_out": left_out,
    }  # fmt: skip


def engine_side(engine: Engine, work: workloads.Workload) -> Callable[[int], Tensor]:
    """Return an engine's round, with the weighted mean of the updates streamed."""
    trainer = Trainer(engine)

    def round(number: int) -> Tensor:
        cohort, _ = trainer.stream(work.job(number), lambda cohort: cohort.weights)
        assert cohort.streamed is not None
        return cohort.streamed.mean

    return round


def check(sides: Mapping[str, harness.Side], others: Mapping[str, Peer], bound: float = TOLERANCE) -> dict[str, float]:
    """Return each side's relative distance from the tight loop's mean update, at most `bound` in float32.

    Raises:
        RuntimeError: a side computes something else.

    """
    exact = sides["tight_loop"](1)
    updates = {name: side(1) for name, side in sides.items() if name != "limit"}
    updates |= {name: peer.update() for name, peer in others.items()}
    differences = {name: float((update - exact).norm() / exact.norm()) for name, update in updates.items()}
    bounds = {name: ROUNDED if name.endswith("bf16") else bound for name in differences}
    if not all(differences[name] <= bounds[name] for name in differences):  # a NaN is no agreement
        raise RuntimeError(f"the sides do not compute the same update: {differences}")
    return differences


def best_threads(side: harness.Side, most: int) -> int:
    """Return how many threads make a baseline fastest, 1 or `most`: small products lose more than they gain."""
    if most == 1:
        return 1
    taken = {}
    for threads in (1, most):
        run = threaded(side, threads)
        run(1)
        began = time.perf_counter()
        run(2)
        taken[threads] = time.perf_counter() - began
    return min(taken, key=lambda threads: taken[threads])


def threaded(side: harness.Side, threads: int) -> harness.Side:
    """Return a side that runs with so many threads inside an operation."""

    def run(number: int) -> Any:
        torch.set_num_threads(threads)
        return side(number)

    return run


def idle(work: workloads.Workload, number: int = 1) -> dict[str, float]:
    """Count what a batched program's chunks compute for nothing, as shares of what they compute.

    A row-step is one step of one row; it is idle if the row has no step left. A sample is idle if it only fills a
    shorter batch up to its neighbours' length. Counted from the steps that chunks of the engine's own size lay out; a
    linear model stands in for the workload's, so that it takes no time.
    """
    wide, _ = make_engine(work.task(), "vectorized", cohort=work.cohort, threads=1, kernels="generic")
    rows = wide.plan["chunk"]
    wide.close()
    module = initialise(lambda: logreg(tuple(work.x.shape[1:]), int(work.y.max()) + 1), 0)
    small = replace(work, module=module)
    engine, _ = make_engine(small.task(), "vectorized", cohort=work.cohort, threads=1, chunk=rows, kernels="fused")
    with counted() as seen:
        Trainer(engine).stream(small.job(number), lambda cohort: cohort.weights)
    engine.close()
    order = work.schedule(number)
    return {
        "idle row-steps": 1 - int(order.num_steps.sum()) / seen["row_steps"],
        "idle samples": 1 - int(order.sizes.sum()) / seen["samples"],
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the row-steps and samples of every step that a chunk lays out."""
    seen = {"row_steps": 0, "samples": 0}
    original = chunk.steps

    def steps(*arguments: Any) -> Any:
        for step in original(*arguments):
            seen["row_steps"] += step.samples.shape[0]
            seen["samples"] += step.samples.numel()
            yield step

    with mock.patch.object(chunk, "steps", steps):
        yield seen
