"""Which engine: by a fixed table of model kind, shapes and device, so that the same config always gets the same."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from fedsim.engine import measured
from fedsim.engine.captured import Captured
from fedsim.engine.sequential import Sequential
from fedsim.engine.task import Engine, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.errors import UserError

TINY, FEW = 5_000, 32  # parameters up to which, and clients from which on, an operation on a batch of them wins
GENERIC_PAYS = 20_000  # parameters up to which `torch.func` over rows beats one client after another on a CPU


def make_engine(task: Task, name: str, cohort: int, threads: int, **arguments: Any) -> tuple[Engine, str]:
    """Return the engine of a name, and why where the name is "auto".

    First comes the user's own row of the table, which `fedsim bench --save` has written. The table: on an
    accelerator, `vectorized` whenever clients can be batched. On a CPU `vectorized` with recorded steps wherever a
    step can be recorded, but for large cohorts of tiny models, which are batched. Where it cannot, `sequential` for
    models that convolve (batched convolutions are 1.3 to 3 times slower there than one client's) and for a lone
    client, and `vectorized` for the others, without fused kernels only up to 20,000 parameters.

    Args:
        task: what all rounds share.
        name: auto, sequential, vectorized, processes or ray.
        cohort: clients a round.
        threads: cores at hand.
        arguments: of that engine.

    Raises:
        UserError: the engine that was asked for cannot run this task.

    """
    if name == "sequential":
        return Sequential(task, **arguments), "as asked"
    if name == "vectorized":
        try:
            return _rows_of_one_program(task, cohort, threads, **arguments), "as asked"
        except ValueError as error:
            raise UserError(f"engine=vectorized: {error}; engine=sequential runs it") from error
    if name in ("processes", "ray"):
        from fedsim.engine.crew import Crew  # which asks here for the engine of each worker

        try:
            return Crew(**arguments).engine(task, name, cohort)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"engine={name}: {error}") from error
    mine = measured.find(measured.situation(task, cohort, threads))
    if mine is not None:
        engine, _ = make_engine(task, cohort=cohort, threads=threads, **mine.arguments)
        return engine, f"measured on {mine.measured} by fedsim bench"
    return _by_table(task, cohort, threads)


def _captures(task: Task, cohort: int) -> bool:
    """Say whether clients one after another without Python beat a batch of them, on a CPU."""
    return task.shared.size > TINY or cohort <= FEW


def _by_table(task: Task, cohort: int, threads: int) -> tuple[Engine, str]:
    """Look an engine up; see `make_engine`."""
    on_cpu = task.device.type == "cpu"
    if on_cpu and _captures(task, cohort):
        with contextlib.suppress(ValueError):
            return Captured(task, threads=threads), "a step can be recorded, on a CPU"
    if on_cpu and any(isinstance(module, nn.Conv2d) for module in task.module.modules()):
        return Sequential(task), "the model convolves, on a CPU"
    if on_cpu and cohort == 1:
        return Sequential(task), "one client a round"
    try:
        engine = Vectorized(task, threads=threads)
    except ValueError as error:
        return Sequential(task), str(error)
    if on_cpu and engine.plan["kernels"] == "generic" and task.shared.size > GENERIC_PAYS:
        engine.close()
        return Sequential(task), "a layer or the objective has no fused kernel, on a CPU"
    return engine, f"{engine.plan['kernels']} kernels fit"


def _rows_of_one_program(
    task: Task, cohort: int, threads: int, *, kernels: str = "auto", chunk: int | None = None
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
    if kernels == "auto" and chunk is None and task.device.type == "cpu" and _captures(task, cohort):
        with contextlib.suppress(ValueError):
            return Captured(task, threads=threads)
    return Vectorized(task, threads=threads, kernels=kernels, chunk=chunk)
