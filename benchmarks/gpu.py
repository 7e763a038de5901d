"""The benchmarks of an accelerator in one command; without one the same code runs small, so that it cannot rot.

The sides are fedsim's engines, the tight loop (plain, compiled, and replayed as CUDA graphs) and the limit: the same
samples through one model at its best batch size. All compute deterministically.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fedsim
from benchmarks import harness, workloads
from benchmarks.loops import GraphedLoop, Limit, TightLoop
from benchmarks.training import engine_side
from benchmarks.workloads import Workload
from fedsim.contracts import Dataset, Partition
from fedsim.engine.auto import make_engine
from fedsim.engine.precision import set_tf32
from fedsim.models.cnn import cnn
from fedsim.peak import Peak

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
# Relative distance of a side's mean update from the plain loop's: rounding of float32, of TF32, of bfloat16. Labels are
# random here, so an update is mostly what clients do not agree on, and rounding weighs more than in a real run.
BOUNDS = {"": 1e-3, "tf32": 1e-1, "bf16": 5e-1}
PATIENCE = 420.0  # seconds after which no section begins


@dataclass(frozen=True, eq=False)
class Placed(Workload):
    """A workload whose data, model and batches lie on a device; a round's positions cross in one copy."""

    device: str = "cpu"

    @classmethod
    def at(cls, device: str, work: Workload) -> Placed:
        """Return a workload moved to a device."""
        own = {field.name: getattr(work, field.name) for field in fields(work)}
        moved = {"x": work.x.to(device), "y": work.y.to(device), "module": work.module.to(device)}
        return cls(**{**own, **moved, "device": device})

    def samples(self, number: int) -> Tensor:
        """Return the positions of all of a cohort's samples."""
        return super().samples(number).to(self.device)

    def batches(self, number: int) -> list[list[Tensor]]:
        """Return the positions of every step of every client."""
        order = self.schedule(number)
        positions = torch.from_numpy(order.positions).to(self.device)
        return [
            [
                positions[order.starts[k] + a : order.starts[k] + b]
                for a, b in (order.bounds(k, s) for s in range(int(order.num_steps[k])))
            ]
            for k in range(self.cohort)
        ]


class CompiledLoop(TightLoop):
    """The tight loop with the model compiled by `torch.compile`."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.module = torch.compile(self.module)


def gpu(options: harness.Options, device: str | None = None) -> dict[str, Any]:
    """Run all sections; on CUDA write docs/gpu.md after each. What fails or finds no time is left out and named.

    Args:
        options: `rounds` bounds the timed rounds.
        device: cuda, or cpu at small sizes; None: cuda where there is one.

    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    large = device != "cpu"
    result: dict[str, Any] = {
        "title": f"on {torch.cuda.get_device_name() if large else 'the CPU, at small sizes'}",
        "ratios": {}, "figures": {}, "plans": {}, "left_out": {}, "notes": [],
    }  # fmt: skip
    jobs = _jobs(result, options, device)
    began = time.perf_counter()
    with _deterministic():
        for title, work in jobs.items():
            if time.perf_counter() - began > PATIENCE:
                result["left_out"][title] = f"{PATIENCE:.0f} s were up"
                continue
            try:
                work()
            except Exception as error:  # the other sections are still worth having
                result["left_out"][title] = f"{type(error).__name__}: {error}".splitlines()[0]
            gc.collect()
            result["machine"] = harness.machine()
            if large:  # after each section: whoever stops the rest has the figures so far
                PAGE.write_text(page(result), encoding="utf-8")
    return result


def _jobs(result: dict[str, Any], options: harness.Options, device: str) -> dict[str, Callable[[], None]]:
    """Return what is measured, in order: what matters most comes first."""
    large = device != "cpu"

    def section(title: str, work: Callable[[], Workload], variants: bool = False) -> Callable[[], None]:
        return lambda: _section(result, title, work(), options, device, variants=variants)

    def profile() -> None:
        result["notes"] += _profile(_b1(100 if large else 2), device)

    def whole() -> None:
        result["figures"]["B1 end to end"] = end_to_end(device, *((500, 50, 1500) if large else (2, 1, 2, 20)))

    jobs: dict[str, Callable[[], None]] = {}
    for cohort in (100, 50) if large else (2,):
        title = f"B1 cohort {cohort}"
        jobs[title] = section(title, partial(_b1, cohort), variants=cohort != 50)
    jobs["B1 end to end"], jobs["profile"] = whole, profile
    jobs["B4"] = section("B4", workloads.b4 if large else partial(workloads.b4, samples=10))
    jobs["B3"] = section("B3", workloads.b3 if large else partial(workloads.b3, clients=20, cohort=2))
    for cohort in (10, 300, 1000) if large else ():
        jobs[f"B1 cohort {cohort}"] = section(f"B1 cohort {cohort}", partial(_b1, cohort))
    return jobs


def _b1(cohort: int) -> Workload:
    """Return B1 with another cohort: each client has 50 images."""
    work = workloads.b1()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50 * cohort, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (50 * cohort,), generator=generator)
    partition = Partition(np.arange(50 * cohort), np.arange(cohort + 1) * 50)
    return replace(work, x=x, y=y, partition=partition, cohort=cohort)


def _section(
    result: dict[str, Any], title: str, work: Workload, options: harness.Options, device: str, *, variants: bool = False
) -> None:
    """Race the sides of a workload."""
    placed = Placed.at(device, work)
    sides: dict[str, harness.Side] = {
        "plain_loop": TightLoop(placed), "limit": Limit(placed, 500 if device != "cpu" else 50),
    }  # fmt: skip
    engines, memory = [], {}
    wanted = ["auto", "sequential", "graphs"]
    wanted += ["auto tf32", "auto bf16", "sequential bf16"] if variants else []
    for name in wanted:
        kind, _, precision = name.partition(" ")
        if device == "cpu" and (precision == "tf32" or kind == "graphs"):
            continue
        with Peak(device) as peak:
            task = replace(placed.task(), precision=precision or "fp32")
            given = {"name": "vectorized", "graphs": True} if kind == "graphs" else {"name": kind}
            engine, _ = make_engine(task, cohort=work.cohort, threads=options.threads, **given)
            side = _switched(engine_side(engine, placed), precision)
            side(1)
        engines.append(engine)
        sides[name], memory[name] = side, peak.bytes
        result["plans"][f"{title}: {name}"] = dict(engine.plan)
    if device == "cpu":
        result["left_out"][f"{title}: graphs, graphed_loop, compiled_loop"] = "for CUDA devices"
    else:
        for name, loop in {
            "graphed_loop": GraphedLoop,
            **({"compiled_loop": CompiledLoop} if variants else {}),
        }.items():
            try:
                sides[name] = loop(placed)
                sides[name](1)
            except Exception as error:  # a compiler may be missing, and the other sides are still worth having
                sides.pop(name, None)
                result["left_out"][f"{title}: {name}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    differences = _check(sides)
    seconds = harness.race(sides, options, least=5, budget=10.0)
    for engine in engines:
        engine.close()
    for name, row in harness.figures(seconds).items():
        extra = {} if memory.get(name) is None else {"memory_mib": memory[name] / 2**20}
        result["figures"][f"{title}: {name}"] = row | extra | {"difference": differences.get(name, 0.0)}
    pairs = [("auto", other) for other in ("graphed_loop", "plain_loop", "compiled_loop", "sequential", "limit")]
    pairs += [("graphs", other) for other in ("auto", "graphed_loop", "limit")]
    pairs += [(name, name.partition(" ")[0]) for name in sides if " " in name]
    result["ratios"] |= {f"{title}: {pair}": row for pair, row in harness.ratios(seconds, pairs).items()}
    sides.clear()
    gc.collect()


def _check(sides: Mapping[str, harness.Side]) -> dict[str, float]:
    """Return each side's relative distance from the plain loop's mean update.

    Raises:
        RuntimeError: a side computes something else.

    """
    exact = sides["plain_loop"](1)
    found = {}
    for name, side in sides.items():
        if name != "limit":
            found[name] = float((side(1) - exact).norm() / exact.norm())
            if not found[name] <= BOUNDS[name.partition(" ")[2]]:  # a NaN is no agreement
                raise RuntimeError(f"{name} computes another update: {found[name]:.1e} off")
    return found


def _switched(side: harness.Side, precision: str) -> harness.Side:
    """Return a side that runs with TF32 products switched on."""
    if precision != "tf32":
        return side

    def run(number: int) -> Any:
        set_tf32("tf32")
        try:
            return side(number)
        finally:
            set_tf32("fp32")

    return run


@contextmanager
def _deterministic() -> Any:
    """Let every side compute as a run does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    set_tf32("fp32")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]


def _profile(work: Workload, device: str) -> list[str]:
    """Return where a round's time goes: the operations with most of it on the device."""
    placed = Placed.at(device, work)
    engine, _ = make_engine(placed.task(), "auto", cohort=work.cohort, threads=1)
    side = engine_side(engine, placed)
    side(1)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device != "cpu" else []
    began = time.perf_counter()
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:  # else torch 2.11 warns of cycles
        side(2)
        if device != "cpu":
            torch.cuda.synchronize()
    wall = 1e6 * (time.perf_counter() - began)
    engine.close()

    def own(row: Any) -> float:
        return float(row.self_device_time_total if device != "cpu" else row.self_cpu_time_total)

    rows = sorted(profile.key_averages(), key=own, reverse=True)
    busy = sum(map(own, rows))
    lines = [f"profile of a round, cohort {work.cohort}: {busy / 1e3:.1f} ms in operations, {wall / 1e3:.1f} ms in all"]
    return lines + [f"  {100 * own(row) / busy:5.1f} %  {row.count:5d} ×  {row.key[:80]}" for row in rows[:10]]


def end_to_end(device: str, clients: int, cohort: int, rounds: int, tested: int = 1000) -> dict[str, float]:
    """Run B1 whole, set-up and evaluation included; return its seconds.

    Args:
        device: where.
        clients: of 50 images each.
        cohort: clients a round.
        rounds: of the run.
        tested: images of the test split.

    """
    generator = torch.Generator().manual_seed(0)
    count = 50 * clients + tested
    x = torch.randn(count, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    splits = {"train": np.arange(50 * clients), "test": np.arange(50 * clients, count)}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = fedsim.simulate(
            "partition=iid", f"partition.num_clients={clients}", f"fraction={cohort / clients}", "client.lr=0.1",
            "client.batch_size=10", "client.local_steps=5", f"device={device}", "data.validation=0",
            data=Dataset(x, y, splits, num_classes=10), model=lambda: cnn((3, 32, 32), 10), num_rounds=rounds,
            folder=Path(folder) / "run",
        )  # fmt: skip
    seconds = result.summary["seconds"]
    total = time.perf_counter() - began
    return {"seconds": total, "rounds": rounds, "training_s": seconds["train"], "evaluation_s": seconds["evaluate"]}


def page(result: Mapping[str, Any]) -> str:
    """Return the results as a page of Markdown."""
    machine = result["machine"]
    lines = [
        f"# On {machine['device']}", "",
        f"Written by `make gpu`: torch {machine['versions']['torch']}, commit {machine['commit']}, deterministic",
        "algorithms, float32 unless said. Medians of rounds in turn (A B C …); all sides compute the same mean update.",
        "", "| side | ms a round | quartiles | memory |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in result["figures"].items():
        if "median_ms" in row:
            memory = f"{row['memory_mib']:.0f} MiB" if "memory_mib" in row else "–"
            lines.append(f"| {name} | {row['median_ms']:.2f} | {row['q1_ms']:.2f} – {row['q3_ms']:.2f} | {memory} |")
    lines += ["", "| speed of a over the speed of b | median | quartiles |", "|---|---|---|"]
    lines += [
        f"| {pair} | {row['median']:.2f} | {row['q1']:.2f} – {row['q3']:.2f} |"
        for pair, row in result["ratios"].items()
    ]
    if whole := result["figures"].get("B1 end to end"):
        lines += [
            "", f"{whole['rounds']} rounds of B1 end to end, set-up and evaluation included: {whole['seconds']:.1f} s, "
            f"of which {whole['training_s']:.1f} s training and {whole['evaluation_s']:.1f} s evaluation.",
        ]  # fmt: skip
    lines += ["", *(f"Left out: {what}: {why}." for what, why in result["left_out"].items())]
    lines += ["", "```text", *result["notes"], "```", ""]
    return "\n".join(lines)
