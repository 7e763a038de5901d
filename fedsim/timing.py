"""Builds the clock of a run, and says at once what its mode cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import flop_registry

from fedsim.clock import Clock, samples_passed
from fedsim.config import Config, instantiate, plain
from fedsim.devices.fleet import Fleet, Population
from fedsim.dispatch import server_of
from fedsim.engine.record import Watch
from fedsim.engine.task import Job, Task
from fedsim.errors import UserError
from fedsim.experiment import Experiment
from fedsim.local import Int64
from fedsim.metrics.communication import num_bytes
from fedsim.metrics.skew import label_counts

SHARED = ("seed", "dropout", "partial_work")  # settings of every device model
_NUMBER = 8  # bytes of a client's weight


def timed(experiment: Experiment, config: Config, parts: Mapping[str, Any]) -> Experiment:
    """Return an experiment with its clock: machines, the model's measured operations, the bytes that travel.

    Raises:
        UserError: devices, mode and strategy do not fit.

    """
    node = plain(config.devices)
    shared = {name: node.pop(name) for name in SHARED if name in node}
    seed = shared.pop("seed", None)
    seed = experiment.settings.seed if seed is None else seed
    devices = parts.get("devices") or instantiate(node, "devices")
    availability = parts.get("availability") or instantiate(config.availability)
    task = experiment.task
    try:
        fleet: Fleet | None = None if devices is None else devices(_population(experiment), seed).checked()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"devices.{error}") from error
    samples = [samples_passed(task.training, task.samples_of(phase), phase) for phase in task.phases]
    down, up = (0.0, 0.0) if fleet is None else _bytes(experiment)
    try:
        clock = Clock(
            fleet=fleet,
            flops=1.0 if fleet is None else training_flops(task),
            samples=np.sum(samples, axis=0),
            down_bytes=down,
            up_bytes=up,
            availability=availability,
            seed=seed,
            **shared,
        )
    except ValueError as error:
        raise UserError(f"devices.{error}") from error
    experiment = replace(experiment, clock=clock)
    _check(experiment)
    return replace(experiment, notes=[*experiment.notes, *_notes(experiment)])


class Flops(Watch):  # type: ignore[no-untyped-call]
    """Counts as torch's `FlopCounterMode` does, by its formulas; that one takes a second to load a compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and add what it takes."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def training_flops(task: Task) -> float:
    """Return the floating-point operations of a forward and a backward pass of one sample, counted on the model.

    Products of matrices and convolutions count, as `torch.utils.flop_counter` does; six a parameter where a model has
    none (Kaplan et al., 2020, §2.1).
    """
    task.module.eval()
    with Flops() as counter, torch.enable_grad():
        task.module(task.x[:2]).sum().backward()
    for parameter in task.module.parameters():
        parameter.grad = None
    flops = counter.total / len(task.x[:2])
    return flops if flops > 0 else 6.0 * max(1, task.shared.size + task.local.size)


def _population(experiment: Experiment) -> Population:
    task = experiment.task
    counts = label_counts(task.y.cpu().numpy(), task.partition, experiment.dataset.num_classes)  # (P, C)
    return Population(task.partition.sizes, counts)


def _bytes(experiment: Experiment) -> tuple[float, float]:
    """Return the bytes that a client is sent, and those that it sends back."""
    task, rule = experiment.task, experiment.strategy
    model = task.shared.size * task.dtype.itemsize
    buffers = task.buffers.size * task.dtype.itemsize if experiment.settings.buffers == "average" else 0
    sent: Mapping[str, Any] = {}
    if hasattr(rule, "broadcast"):
        sent = rule.broadcast(rule.init(task.shared, len(experiment.participants)))
    uplink = getattr(experiment, "uplink", None)
    update = None if uplink is None else uplink.num_bytes(task.dtype.itemsize)
    reply = (model if update is None else update) + buffers + _NUMBER + _extras(experiment, sent)
    return float(model + buffers + num_bytes(sent)), float(reply)


def _extras(experiment: Experiment, sent: Mapping[str, Any]) -> int:
    """Return the bytes of what a client sends beside its update; only training one tells where there is a `finish`."""
    task = experiment.task
    if not hasattr(task.objective, "finish") or not len(experiment.participants):
        return task.dtype.itemsize  # its training loss
    clients: Int64 = experiment.participants[:1]
    placed = {n: v.to(task.device, task.dtype) if isinstance(v, torch.Tensor) else v for n, v in sent.items()}
    job = Job(
        clients=clients, received=np.zeros(1, dtype=np.int64), models={0: experiment.initial}, broadcasts={0: placed},
        buffers=experiment.initial_buffers, state=task.store.get(clients, task.device), round=1, key=1,
        lr=task.training.rate(1),
    )  # fmt: skip
    block = experiment.engine.train(job, experiment.initial.new_empty(1, task.shared.size))
    return sum(num_bytes(value[:1]) for value in block.extras.values())


def _check(experiment: Experiment) -> None:
    mode, clock, rule = experiment.mode, experiment.clock, experiment.strategy
    try:
        mode.check(server_of(experiment, lambda *_: experiment.participants))
    except ValueError as error:
        raise UserError(f"mode: {error}") from error
    choice = type(mode).__name__
    if mode.stale and not callable(rule):
        raise UserError(
            f"mode {choice} hands stale updates to the strategy, which Flower's cannot take: use a fedsim rule"
        )
    if mode.stale and experiment.foreign is not None:
        raise UserError(
            f"mode {choice} trains from versions of the model, which a Flower ClientApp does not: use mode=sync"
        )
    if clock.partial_work < 1 and experiment.foreign is not None:
        raise UserError("devices.partial_work is done by fedsim's clients, not by a Flower ClientApp: set it to 1")


def _notes(experiment: Experiment) -> list[str]:
    """Return what a user may not expect of a mode."""
    mode, rule, last = experiment.mode, experiment.strategy, experiment.settings.num_rounds
    found = []
    if getattr(rule, "for_staleness", False) and not mode.stale:
        found.append(
            f"{type(rule).__name__} is made for late updates, and in mode {type(mode).__name__} none comes late: "
            "mode=async, mode=fixed_delay and mode=deadline mode.late=deliver have some"
        )
    if getattr(mode, "delay", 0) >= last:
        found.append(f"mode.delay={mode.delay}: nothing of the slow clients arrives in {last} rounds")
    return found
