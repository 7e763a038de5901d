"""Which engine: by a fixed table of model kind, shapes and device, so that the same config always gets the same."""

from __future__ import annotations

import contextlib
from typing import Any

from fedsim.engine import measured
from fedsim.engine.captured import Captured
from fedsim.engine.replicas import rows_together
from fedsim.engine.sequential import Sequential
from fedsim.engine.table import microseconds, shapes
from fedsim.engine.task import Engine, Task
from fedsim.engine.vectorized import Vectorized, chunk_rows
from fedsim.errors import UserError


def make_engine(
    task: Task, name: str, cohort: int, threads: int, *, beside: int = 1, **arguments: Any
) -> tuple[Engine, str]:
    """Return the engine of a name, and why where the name is "auto".

    First comes the user's own row of the table, which `fedsim bench --save` has written, where its engine can run the
    task. Then, on an accelerator,
    `vectorized` whenever clients can be batched; on a CPU the cheapest by `engine.table` of what runs the task:
    recorded steps, a batch of clients by fused or generic kernels, or `sequential`.

    Args:
        task: what all rounds share.
        name: auto, sequential, vectorized, processes or ray.
        cohort: clients a round.
        threads: cores at hand.
        beside: runs whose rows train as one program with it, itself among them: the table counts the rows of all.
        arguments: of that engine.

    Raises:
        UserError: the engine that was asked for cannot run this task.

    """
    if name == "sequential":
        return Sequential(task, **arguments), "as asked"
    if name == "vectorized":
        try:
            engine = _rows_of_one_program(task, cohort, threads, beside, **arguments)
        except ValueError as error:
            raise UserError(f"engine=vectorized: {error}; engine=sequential runs it") from error
        refused = getattr(engine, "no_graphs", "captured steps are no CUDA graphs") if arguments.get("graphs") else None
        return engine, f"as asked, but without engine.graphs: {refused}" if refused else "as asked"
    if name in ("processes", "ray"):
        from fedsim.engine.crew import Crew  # which asks here for the engine of each worker

        try:
            return Crew(**arguments).engine(task, name, cohort)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"engine={name}: {error}") from error
    mine = measured.find(measured.situation(task, cohort, threads))
    if mine is None:
        return _by_table(task, cohort, threads, beside)
    try:
        engine, _ = make_engine(task, cohort=cohort, threads=threads, **mine.arguments)
    except UserError as error:  # the situation does not say all that an engine may refuse
        engine, why = _by_table(task, cohort, threads, beside)
        return engine, f"{why}; not as measured on {mine.measured} by fedsim bench: {error}"
    return engine, f"measured on {mine.measured} by fedsim bench"


def _by_table(task: Task, cohort: int, threads: int, beside: int) -> tuple[Engine, str]:
    """Look an engine up; see `make_engine`."""
    if task.device.type != "cpu":
        try:
            engine = Vectorized(task, threads=threads)
        except ValueError as error:
            return Sequential(task), str(error)
        return engine, f"{engine.plan['kernels']} kernels fit"
    refused = ""
    for kernels in _cheapest_first(task, cohort, threads, beside):
        if kernels == "sequential":
            return Sequential(task), refused or "one client after another is cheapest here, on a CPU"
        try:
            return _with_kernels(task, threads, kernels)
        except ValueError as error:
            refused = str(error)
    raise AssertionError("the sequential engine runs every task")


def _cheapest_first(task: Task, cohort: int, threads: int, beside: int) -> list[str]:
    """Return `sequential` and the kernels of `vectorized`, in ascending cost of a round on a CPU."""
    given, rows = shapes(task, cohort * beside, threads), chunk_rows(task)
    if beside > 1 and cohort < rows:
        rows = rows_together(task, cohort * beside, rows)
    cost = {
        "captured": microseconds("captured", given),
        "fused": microseconds("fused", given, rows),
        "generic": microseconds("generic", given, rows),
        "sequential": microseconds("sequential", given),
    }
    return sorted(cost, key=lambda name: cost[name])


def _with_kernels(task: Task, threads: int, kernels: str) -> tuple[Engine, str]:
    """Return `vectorized` with some kernels, and why.

    Raises:
        ValueError: they do not fit.

    """
    if kernels == "captured":
        return Captured(task, threads=threads), "a step can be recorded, on a CPU"
    return Vectorized(task, threads=threads, kernels=kernels), f"{kernels} kernels fit"


def _rows_of_one_program(  # noqa: PLR0913  a config's arguments among them
    task: Task,
    cohort: int,
    threads: int,
    beside: int,
    *,
    kernels: str = "auto",
    chunk: int | None = None,
    graphs: bool = False,
) -> Engine:
    """Return the engine of `engine=vectorized`: recorded steps or a batched program, as the table says.

    Raises:
        ValueError: an argument is out of range, or what a client does cannot be done that way.

    """
    if kernels == "captured":
        if chunk is not None:
            raise ValueError(
                f"engine.chunk={chunk} is for fused and generic kernels; captured clients train one by one"
            )
        return Captured(task, threads=threads)
    if kernels == "auto" and chunk is None and task.device.type == "cpu":
        for name in _cheapest_first(task, cohort, threads, beside):
            if name != "sequential":
                with contextlib.suppress(ValueError):
                    return _with_kernels(task, threads, name)[0]
    return Vectorized(task, threads=threads, kernels=kernels, chunk=chunk, graphs=graphs)
