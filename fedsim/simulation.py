"""Runs: from a config, from objects, or from the folder of a run that was cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from fedsim import checkpoint
from fedsim.build import build
from fedsim.build_data import data
from fedsim.config import Config, compose, to_yaml
from fedsim.console import Observer
from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import save_partition
from fedsim.drawn import counts, names
from fedsim.engine.failing import AllUpdatesBad, BadUpdate
from fedsim.engine.precision import emulated
from fedsim.errors import ClientError, UserError
from fedsim.experiment import Experiment
from fedsim.files import atomic, save_tensors
from fedsim.folder import locked, storage
from fedsim.loop import Loop
from fedsim.metrics.records import RoundLog, write_json
from fedsim.metrics.skew import skew
from fedsim.notebook import default_observer
from fedsim.objects import with_parts
from fedsim.partition.picture import draw
from fedsim.plan import departures, read_plan
from fedsim.saved import amend, claim_run_dir, has_fixed_folder, load, run_dir_named
from fedsim.summary import plan_line, shown, summarised
from fedsim.trackers import tracked

if TYPE_CHECKING:
    from fedsim.plots import Picture

GROUPS = ("data", "partition", "model", "client", "training", "strategy", "sampler", "metrics", "attack", "compressor",
          "tracker", "mode", "shift")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run leaves; all of it stands in its folder too."""

    folder: Path
    summary: Mapping[str, Any]
    model: nn.Module = field(repr=False)  # with the final weights, on the run's device, in eval mode

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The rows of rounds.jsonl."""
        return RoundLog.read(self.folder / "rounds.jsonl")

    def plot(self, *columns: str) -> Picture:
        """Draw columns of `rounds` against rounds, by default accuracy and loss; a notebook shows the figure."""
        from fedsim.plots import plot  # here: it loads matplotlib

        return plot(self.rounds, columns or ("accuracy", "loss"))


@overload
def simulate(*overrides: str, replicas: int, observer: Observer | None = None, **settings: Any) -> list[Result]: ...
@overload
def simulate(*overrides: str, observer: Observer | None = None, **settings: Any) -> Result: ...
def simulate(
    *overrides: str, replicas: int | None = None, observer: Observer | None = None, **settings: Any
) -> Result | list[Result]:
    """Run an experiment from Python.

    >>> result = simulate("strategy=fedld", num_rounds=2)  # doctest: +SKIP
    >>> result.summary["accuracy"]  # doctest: +SKIP
    0.31

    Args:
        overrides: as on the command line, e.g. "strategy=fedld", "partition.alpha=0.1".
        replicas: runs side by side with the seeds seed, seed + 1, …, as rows of one program; None is one run.
        observer: who is told of the rounds; None: the notebook's cell, elsewhere nobody.
        settings: shared scalars by name (num_rounds=10, seed=1, …), the choice of a group as text, or an object in
            its place: data=a `Dataset` or a function that returns one, model=an `nn.Module` or a function,
            client=an objective, training=a `LocalTraining`, strategy=a rule or a Flower strategy, partition, sampler;
            `folder` is the run folder.

    Returns:
        The result; with `replicas` a list of them, in the order of their seeds.

    Raises:
        UserError: anything that cannot be run.
        RuntimeError: nothing is left to go on with; of replicas, some failed and all others were done.

    """
    parts = {name: value for name, value in settings.items() if name in GROUPS and not isinstance(value, str)}
    given = list(overrides)
    for name, value in settings.items():
        if name in parts:
            continue
        key = "hydra.run.dir" if name == "folder" else name
        given.append(f"{key}={_override(value)}")
    if replicas is not None:
        from fedsim.replicas import run as run_replicas  # here: it is made of runs

        return run_replicas(compose([*given, f"replicas={replicas}"]), observer or default_observer(), parts)
    config = compose(given)
    if config.replicas != 1:
        raise UserError("replicas is an argument here, for the result is another: fedsim.simulate(…, replicas=10)")
    return run(config, observer or default_observer(), parts)


def _override(value: Any) -> str:
    if isinstance(value, str | Path):
        return json.dumps(str(value)) if set(str(value)) & set(" ,:{}[]()'\"=#$\\") else str(value)
    return json.dumps(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Launch:
    """A run that is built, and has a folder; nothing is written there yet."""

    experiment: Experiment
    config: Config
    folder: Path
    seconds: float  # that building it took
    saved: Mapping[str, Any] | None = None  # the plan of the run that is gone on with

    def go(self, observer: Observer) -> Result:
        """Run it to its end."""
        with storage(self.folder), locked(self.folder):
            if self.saved is None:
                _describe(self.experiment, self.config, self.folder)
            else:
                _write_config(self.config, self.folder)
            return _drive(self.experiment, self.folder, observer, time.perf_counter() - self.seconds, self.saved)


def launch(config: Config, parts: Mapping[str, Any] | None = None, *, beside: int = 1) -> Launch:
    """Build a run from a composed config, one of so many `beside` each other; its folder must not hold one already."""
    folder = Path(config.hydra.run.dir)
    if has_fixed_folder(config) and (folder / "plan.json").exists():
        raise UserError(f"{folder} holds a run already; go on with `fedsim run resume={folder}` or choose another")
    started = time.perf_counter()
    if parts:
        config = with_parts(config, parts)
    experiment = build(config, parts, beside=beside)
    folder = claim_run_dir(config)
    return Launch(experiment=experiment, config=config, folder=folder, seconds=time.perf_counter() - started)


def run(config: Config, observer: Observer, parts: Mapping[str, Any] | None = None) -> Result:
    """Run a composed config in its run folder, which must not hold a run already."""
    return launch(config, parts).go(observer)


def resume(folder: Path, overrides: Sequence[str], observer: Observer) -> Result:
    """Go on with a run in its folder, from its newest checkpoint, with its config.

    Args:
        folder: a run folder.
        overrides: `num_rounds`, `tracker`, `client_state_bytes` and the engine's `workers`, `devices` and `address` may
            change; anything else must be as it was.
        observer: who is told.

    Raises:
        UserError: no such run, a checkpoint that cannot be read, or overrides that would make it another run, or a
            shorter one.

    """
    return relaunch(folder, overrides).go(observer)


def relaunch(folder: Path, overrides: Sequence[str]) -> Launch:
    """Build the run of a folder again, to go on with it."""
    folder = Path(folder)
    config = amend(load(folder), overrides)
    parts = config.hydra.get("parts")
    if parts:
        raise UserError(
            f"resume={folder}: the run was started from Python with objects for {', '.join(parts)}; "
            "call fedsim.simulate again"
        )
    done = max(checkpoint.rounds(folder / "checkpoints"), default=0)
    if config.num_rounds < done:
        raise UserError(
            f"resume={folder}: the run has {done} rounds, and cannot go back to num_rounds={config.num_rounds}"
        )
    saved = read_plan(folder)
    started = time.perf_counter()
    experiment = build(config, saved=saved)
    seconds = time.perf_counter() - started
    return Launch(experiment=experiment, config=config, folder=folder, seconds=seconds, saved=saved)


def _write_config(config: Config, folder: Path) -> None:
    with atomic(folder / "config.yaml") as file:
        file.write(to_yaml(config, provenance=True).encode())


def _describe(experiment: Experiment, config: Config, folder: Path) -> None:
    """Write what the run is, before it starts."""
    _write_config(config, folder)
    write_json(folder / "plan.json", experiment.plan)
    save_partition(folder / "partition.npz", experiment.partition, experiment.local)


def _drive(
    experiment: Experiment, folder: Path, observer: Observer, started: float, saved: Mapping[str, Any] | None = None
) -> Result:
    """Run the rounds, telling the tracker too if there is one."""
    with tracked(observer, experiment.tracker, folder, experiment.config) as told:
        return _rounds(experiment, folder, told, started, saved)


def _rounds(
    experiment: Experiment, folder: Path, observer: Observer, started: float, saved: Mapping[str, Any] | None
) -> Result:
    """Run the rounds and write the results; what was finished is kept whatever happens."""
    loop = Loop(experiment, folder, observer)
    experiment.initial.data = experiment.initial.new_empty(0)  # the loop's alone, which lets go of them in round 1
    if saved:
        loop.load()
        _keep_plan(experiment, saved, loop, observer)
        if loop.round >= experiment.settings.num_rounds:
            observer.note(f"the run has its {loop.round} rounds already")
    observer.plan(plan_line(experiment.plan, None if loop.uplink is None else loop.uplink.adversary))
    for line in experiment.notes:
        observer.note(line)
    if slow := emulated(experiment.task.precision, experiment.task.device):
        observer.warn(slow)
    setup = time.perf_counter() - started
    try:
        loop.run()
    except (AllUpdatesBad, BadUpdate, ClientError) as error:
        _write_model(experiment, loop, folder)
        raise RuntimeError(f"{error} ({folder})") from error
    _write_model(experiment, loop, folder)
    loop.clients.merge()
    summary = summarised(experiment, loop, setup=setup)
    _draw(experiment.dataset, experiment.partition, folder)
    write_json(folder / "summary.json", summary)
    observer.finish({**shown(summary), "folder": str(folder)})
    return Result(folder=folder, summary=summary, model=experiment.task.module.eval())


def _keep_plan(experiment: Experiment, saved: Mapping[str, Any], loop: Loop, observer: Observer) -> None:
    """Say what a resumed run cannot keep of its plan, and write down from which round on: its bits may differ."""
    now = {}
    for key, before, value in departures(saved, experiment.plan, joined=experiment.mimic is not None):
        observer.warn(f"the plan's {key} was {before} and is {value}: results may differ in the last bits")
        now[key] = value
    changes = experiment.plan["changes"]
    if now and loop.round < experiment.settings.num_rounds:
        changes.append({"round": loop.round + 1, **now})
    loop.plan = {**saved, "changes": changes}
    loop.write_plan()


def _write_model(experiment: Experiment, loop: Loop, folder: Path) -> None:
    """Write the last good global model, and leave its weights in the module."""
    task = experiment.task
    own = dict(task.module.named_parameters())
    buffers = dict(task.module.named_buffers())
    with torch.no_grad():
        for name, value in task.shared.split(loop.weights).items():
            own[name].copy_(value)
        for name, value in task.buffers.split(loop.backend.buffers).items():
            buffers[name].copy_(value)
    tensors: dict[str, Tensor] = {}
    for name, value in task.module.state_dict().items():
        if name not in task.local.names:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    partial = folder / ".model.tmp"
    save_tensors(tensors, partial)
    partial.replace(folder / "model.safetensors")


def _draw(dataset: Dataset, drawn: Partition, folder: Path) -> None:
    """Draw whose samples are of which class."""
    path, classes = folder / "partition.png", dataset.class_names
    draw(counts(dataset, drawn), path, class_names=classes, client_names=names(dataset, drawn))


def partition(config: Config, observer: Observer) -> Path:
    """Draw a partition, measure and picture it without training; return the run folder."""
    dataset, drawn, local = data(config)
    run_dir_named(config, f"partition-{config.hydra.runtime.choices.partition}")
    folder = claim_run_dir(config)
    with storage(folder), locked(folder):
        _write_config(config, folder)
        save_partition(folder / "partition.npz", drawn, local)
        figures = skew(counts(dataset, drawn))
        _draw(dataset, drawn, folder)
        write_json(folder / "summary.json", {"status": "done", **{name: value for name, value, _ in figures.rows()}})
    observer.skew(figures.rows())
    observer.note(f"{folder}/partition.png")
    return folder
