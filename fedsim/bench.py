"""`fedsim bench`: the rounds of one's own config on every engine that runs it, side by side."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.build import build
from fedsim.children import num_cores
from fedsim.config import Config, from_tree, plain
from fedsim.console import Observer
from fedsim.data.kept import keeping
from fedsim.engine import measured
from fedsim.errors import UserError
from fedsim.experiment import Experiment
from fedsim.loop import Loop
from fedsim.peak import Peak
from fedsim.quantities import duration, size

# Arguments of the group `engine` that are compared; Ray is not: what it gains hangs on a cluster.
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "sequential": {"name": "sequential"},
    "vectorized, captured": {"name": "vectorized", "kernels": "captured"},
    "vectorized, fused": {"name": "vectorized", "kernels": "fused"},
    "vectorized, generic": {"name": "vectorized", "kernels": "generic"},
    "processes": {"name": "processes"},
}
MOST, LEAST = 20, 2  # timed rounds of an engine
HOPELESS = 4.0  # times the quickest warm-up round, beyond which an engine need not be timed if time is short
# Largest difference of the first round's step between engines that is rounding: promise 3, and in float32 room for
# rules that are discontinuous in the updates.
ROUNDING = {"float64": 1e-9, "float32": 1e-2}


@dataclass(eq=False)
class Side:
    """One engine's run of the config, as far as it got."""

    name: str
    arguments: Mapping[str, Any]
    loop: Loop | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    first: Tensor | None = None  # step of round 1, (D,)
    warm: float = math.inf  # seconds of round 1
    seconds: list[float] = field(default_factory=list)  # of the timed rounds
    memory: int | None = None  # bytes that this process took for the engine and its first round
    refusal: str = ""  # why it does not run

    @property
    def round(self) -> float:
        """Seconds of a round: the median; infinite where none was timed."""
        return statistics.median(self.seconds) if self.seconds else math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What was measured."""

    sides: list[Side]  # in the order of `ENGINES`
    auto: Side  # what engine=auto takes, and its plan; without rounds of its own
    clients: float  # a round
    samples: float  # passed forward and backward a round
    situation: str  # key of the user's row
    cut: bool  # the time was up before the wanted rounds were done
    rounding: float  # differences up to here are rounding

    @property
    def best(self) -> Side:
        """The quickest side."""
        return min(self.sides, key=lambda side: side.round)

    def save(self) -> Path:
        """Write the quickest engine as the user's own row of the table; return the file."""
        times = {side.name: round(1e3 * side.round, 3) for side in self.sides if side.seconds}
        winner = measured.Winner(dict(self.best.arguments), datetime.now(UTC).date().isoformat())
        return measured.save(self.situation, winner, {"milliseconds": times})

    def lines(self) -> list[str]:
        """Return the table and what follows from it, as text."""
        head = ("engine", "ms a round", "clients/s", "samples/s", "memory", "difference")
        rows = [head, *(self._row(side) for side in self.sides if side.seconds or not side.refusal)]
        widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        lines += [f"{side.name}: does not run: {side.refusal}" for side in self.sides if side.refusal]
        far = [side.name for side in self.sides if self._difference(side) > self.rounding]
        if far:
            lines.append(f"the first round of {', '.join(far)} differs by more than {self.rounding:g}: report it")
        lines.append(f"engine=auto takes {self.auto.plan['engine']} ({self.auto.plan['why']})")
        if self.cut:
            counts = sorted({len(side.seconds) for side in self.sides if side.seconds})
            lines.append(f"time was short: {'–'.join(map(str, counts))} timed rounds an engine")
        return lines

    def _row(self, side: Side) -> tuple[str, ...]:
        memory = "–" if side.memory is None else size(side.memory)
        difference = "–" if side.first is None else f"{self._difference(side):.0e}"
        if not side.seconds:
            return side.name, f"> {1e3 * self.best.round:.0f}", "–", "–", memory, difference
        speed = (f"{1e3 * side.round:.2f}", f"{self.clients / side.round:,.0f}", f"{self.samples / side.round:,.0f}")
        return side.name, *speed, memory, difference

    def _difference(self, side: Side) -> float:
        """Return how far the first round's step is from the first side's, over that one's norm."""
        exact = next(other.first for other in self.sides if other.first is not None)
        if side.first is None:
            return 0.0
        return float(torch.linalg.vector_norm(side.first - exact) / torch.linalg.vector_norm(exact).clamp(min=1e-30))


def bench(config: Config, *, seconds: float = 45.0, say: Callable[[str], None] = lambda _: None) -> Report:
    """Measure a config on every engine that runs it, in turn.

    One round of each warms up and tells memory and agreement; then rounds are timed, without evaluation.

    Args:
        config: of a run.
        seconds: after which no more rounds begin, but for two of each engine.
        say: told what is going on.

    Returns:
        The figures.

    Raises:
        UserError: the config cannot be run, or no engine runs it.

    """
    began = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(keeping({}))
        auto, experiment = _auto(config)
        sides = [Side(name, arguments) for name, arguments in _engines(config).items()]
        for number, side in enumerate(sides):
            say(f"{side.name}: first round")
            stack.callback(_close, side)
            _start(side, config, folder / str(number))
        running = [side for side in sides if not side.refusal]
        if not running:
            raise UserError(f"no engine runs this config: {sides[0].refusal}")
        cut = _race(running, seconds - (time.perf_counter() - began), say)
        cohort = max(1, experiment.cohort_size)
        threads = experiment.settings.threads or num_cores()
        return Report(
            sides=sides, auto=auto, clients=cohort, samples=_samples(experiment), cut=cut,
            situation=measured.situation(experiment.task, cohort, threads),
            rounding=ROUNDING[experiment.settings.dtype],
        )  # fmt: skip


def _engines(config: Config) -> dict[str, Mapping[str, Any]]:
    """Return what is compared: every engine, and the config's own where it is none of them as they come."""
    given = plain(config.engine)
    sides = dict(ENGINES)
    if given["name"] != "auto":
        sides["as given"] = given
    return sides


def _auto(config: Config) -> tuple[Side, Experiment]:
    """Find out what engine=auto takes."""
    arguments = {"name": "auto"}
    experiment = build(_with_engine(config, arguments))
    experiment.engine.close()
    if experiment.foreign is not None:
        raise UserError("client: a Flower ClientApp trains its clients itself; there are no engines to compare")
    return Side("auto", arguments, plan=experiment.plan), experiment


def _with_engine(config: Config, arguments: Mapping[str, Any]) -> Config:
    return from_tree({**plain(config), "engine": dict(arguments)})


def _start(side: Side, config: Config, folder: Path) -> None:
    """Build a side and do its first round."""
    folder.mkdir()
    try:
        with Peak(_device(config)) as peak:
            experiment = build(_with_engine(config, side.arguments))
            never = replace(experiment.evaluation, every=1 << 40, clients_every=0, decomposition_every=0)
            endless = replace(experiment.settings, num_rounds=1 << 40, target_accuracy=None)
            side.loop = Loop(replace(experiment, evaluation=never, settings=endless), folder, Observer())
            side.warm = _round(side.loop)
        side.plan, side.memory = experiment.plan, peak.bytes
        side.first = (side.loop.weights - experiment.initial).cpu().double()
    except Exception as error:  # whatever ails one engine, the others can be measured
        first = (str(error).strip().splitlines() or [""])[0]
        side.refusal = first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _close(side: Side) -> None:
    if side.loop is not None:
        side.loop.rounds.close()
        side.loop.times.close()
        side.loop.experiment.engine.close()


def _race(sides: list[Side], seconds: float, say: Callable[[str], None]) -> bool:
    """Time rounds of the sides in turn; return whether the time was up before all were done."""
    quickest = min(side.warm for side in sides)
    for side in sides:
        if side.warm > HOPELESS * quickest and side.loop is not None:  # workers start in the first round
            side.warm = min(side.warm, _round(side.loop))
    if LEAST * sum(side.warm for side in sides) > seconds:
        sides = [side for side in sides if side.warm <= HOPELESS * quickest]
    ends = time.perf_counter() + seconds
    say(f"rounds in turn, {duration(max(1.0, min(seconds, MOST * sum(side.warm for side in sides))))} at most")
    for number in range(MOST):
        if number >= LEAST and time.perf_counter() + sum(side.round for side in sides) > ends:
            return True
        for side in sides:
            assert side.loop is not None  # only sides that run are raced
            side.seconds.append(_round(side.loop))
    return False


def _round(loop: Loop) -> float:
    """Do a round; return its seconds."""
    began = time.perf_counter()
    loop.step(loop.round + 1)
    if loop.task.device.type == "cuda":
        torch.cuda.synchronize(loop.task.device)
    return time.perf_counter() - began


def _device(config: Config) -> str:
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return automatic if config.device == "auto" else str(config.device)


def _samples(experiment: Experiment) -> float:
    """Return the expected samples that a round passes forward and backward."""
    training = experiment.task.training
    sizes = experiment.task.partition.sizes[experiment.participants]
    per_pass = np.ceil(sizes / (training.batch_size or sizes))  # (P,)
    return experiment.cohort_size * float((training.num_steps(sizes) * sizes / per_pass).mean())
