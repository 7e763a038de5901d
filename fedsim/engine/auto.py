"""Which engine: by a fixed table of model kind, shapes and device, so that the same config always gets the same."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedsim.engine import measured
from fedsim.engine.sequential import Sequential
from fedsim.engine.task import Engine, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.errors import UserError

GENERIC_PAYS = 20_000  # parameters up to which `torch.func` over rows beats one client after another on a CPU


def make_engine(task: Task, name: str, cohort: int, threads: int, **arguments: Any) -> tuple[Engine, str]:
    """Return the engine of a name, and why where the name is "auto".

    First comes the user's own row of the table, which `fedsim bench --save` has written. The table: on an
    accelerator, `vectorized` whenever clients can be batched. On a CPU `sequential` for models that convolve (batched
    convolutions are 1.3 to 3 times slower there than one client's) and for a lone client; `vectorized` for the
    others, without fused kernels only up to 20,000 parameters.

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
            return Vectorized(task, threads=threads, **arguments), "as asked"
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
    on_cpu = task.device.type == "cpu"
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
