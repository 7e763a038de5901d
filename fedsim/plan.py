"""A run's plan: everything that decides its bits, resolved before round 1; and what cannot be run at all."""

from __future__ import annotations

import copy
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim import __version__, checkpoint
from fedsim.contracts import LinearRule
from fedsim.engine.auto import make_engine
from fedsim.engine.rounds import block_rows
from fedsim.engine.task import BUFFER, LOCAL, Engine, Task
from fedsim.errors import UserError
from fedsim.experiment import Experiment
from fedsim.metrics.budget import Evaluation
from fedsim.shards import shard_bytes
from fedsim.threads import take_threads


def planned(experiment: Experiment, config: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Experiment:
    """Resolve what decides the bits: written to plan.json and to every checkpoint, and taken from there on resume.

    Args:
        experiment: whose `plan` says why its engine was chosen.
        config: plain, as written to config.yaml.
        saved: the plan of the run that is gone on with; its rhythms hold whatever the budget would say now.

    """
    task, run = experiment.task, experiment.settings
    cohort = experiment.num_participants
    sizes = task.partition.sizes[experiment.participants]
    steps = task.training.num_steps(sizes)
    batch = np.minimum(sizes, task.training.batch_size or sizes.max())
    passed = np.where(sizes > 0, steps * batch, 0)
    samples = max(1, round(float(passed.mean()) * cohort))
    kept = {"every": saved["evaluate_every"], "clients_every": saved["evaluate_clients_every"]} if saved else {}
    evaluation: Evaluation = replace(experiment.evaluation, **kept).resolve(
        samples,
        experiment.evaluation.passes
        * sum(len(p) for name, p in experiment.dataset.splits.items() if name not in ("train", "backdoor")),
        int(experiment.splits.test.sizes.sum()) + _tuning_samples(experiment),
    )
    why = _needs_rows(experiment, evaluation)
    size = 12 * task.shared.size + shard_bytes(task.store, cohort)
    cost = CheckpointCost(float(steps.mean()) * cohort, samples, task.shared.size, size)
    engine = dict(experiment.engine.plan)
    plan = {
        "engine": engine.pop("engine"),
        "engine_arguments": engine,
        **({"workers": count} if (count := getattr(experiment.engine, "workers", None)) else {}),  # decides no bits
        **experiment.plan,
        "rows": f"held: {why}" if why else "streamed",
        "block_rows": saved["block_rows"] if saved else block_rows(experiment.engine),
        "updates": saved["updates"] if saved else _updates(experiment, why),
        "device": torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else task.device.type,
        "threads": torch.get_num_threads(),
        "dtype": run.dtype,
        "precision": run.precision,
        "parameters": task.shared.size,
        "cohort": cohort,
        "clients": len(experiment.participants),
        "evaluate_every": evaluation.every,
        "evaluate_clients_every": evaluation.clients_every,
        "replicas": 1,  # runs whose rows train as one program
        "checkpoint_every": saved["checkpoint_every"] if saved else run.checkpoint.every or cost.every(),
        "versions": {
            "fedsim": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "flwr": version("flwr"),
        },
        "changes": copy.deepcopy(saved["changes"]) if saved else [],
    }  # fmt: skip
    return replace(experiment, plan=plan, evaluation=evaluation, config=config)


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan of a run: its plan.json, or what its newest checkpoint says where that cannot be read.

    Raises:
        UserError: neither can be read.

    """
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
        _ = plan["engine_arguments"], plan["changes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        checkpoints = folder / "checkpoints"
        if not checkpoint.rounds(checkpoints):
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"resume={folder}: its plan.json cannot be read: {what}") from error
        plan = checkpoint.load(checkpoints)[1]["plan"]
    return plan


def planned_engine(
    task: Task, given: Mapping[str, Any], *, cohort: int, threads: int, saved: Mapping[str, Any] | None, beside: int = 1
) -> tuple[Engine, str]:
    """Make the engine, and say why it is this one.

    Args:
        task: what all rounds share.
        given: the config's arguments of the engine, `name` among them.
        cohort: clients a round.
        threads: cores at hand.
        beside: runs that train as one program with this one, itself among them.
        saved: the plan of the run that is gone on with. Its engine and its torch threads are taken again, with what
            the config says of arguments that decide no bits (workers); on another kind of device they are not.

    """
    if saved is None:
        return make_engine(task, cohort=cohort, threads=threads, beside=beside, **given)
    now = as_changed(saved)
    take_threads(now["threads"])
    if (now["device"] == "cpu") != (task.device.type == "cpu"):
        return make_engine(task, cohort=cohort, threads=threads, **given)
    own = given if given["name"] == now["engine"] else {}
    again = {**own, "name": now["engine"], **now["engine_arguments"]}
    return make_engine(task, cohort=cohort, threads=threads, **again)[0], now["why"]


def as_changed(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan with what earlier resumed runs could not keep; halved chunks hold from their round on."""
    tree = copy.deepcopy(dict(plan))
    for change in plan["changes"]:
        for key, value in change.items():
            if key not in ("round", "chunk", "block_rows"):
                *path, last = key.split(".")
                node = tree
                for name in path:
                    node = node[name]
                node[last] = value
    return tree


def departures(
    saved: Mapping[str, Any], plan: Mapping[str, Any], *, joined: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value before, value now) of what a resumed run cannot keep of its plan: then bits may differ.

    Args:
        saved: the plan of the run that is gone on with.
        plan: this run's.
        joined: the server imitates clients, those of all replicas as rows of one program.

    """
    before, now = as_changed(saved), json.loads(json.dumps(as_changed({**plan, "changes": []})))
    recorded = all(side["engine_arguments"].get("kernels") == "captured" for side in (before, now))
    for side in (before, now):
        if recorded and not joined:  # no bit of a recorded step hangs on how many replicas train
            side.pop("replicas", None)
        side.pop("changes")
        side.pop("why")
        side.pop("workers", None)
    yield from _differences(before, now)


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        for name in sorted(a):
            yield from _differences(a[name], b[name], f"{prefix}.{name}".lstrip("."))
    elif a != b:
        yield prefix, a, b


def _tuning_samples(experiment: Experiment) -> int:
    """Return how many evaluated samples fine-tuning all clients once is worth: a trained one is worth three."""
    splits = experiment.splits
    sizes = np.where(splits.held_out, splits.test.sizes // 2, splits.train.sizes)  # (K,)
    batch = np.minimum(sizes, experiment.task.training.batch_size or sizes.max())
    return 3 * experiment.evaluation.finetune_steps * int(batch.sum())


def _updates(experiment: Experiment, why: str | None) -> dict[str, Any]:
    """Say where the matrix of updates lies, and of how many bytes a step of a rule may be where it is on the host.

    It is there where it would take more than half of the device's memory, which training needs too. Attacks,
    compressors and rules that train read it whole; they leave it on the device.
    """
    task, run, rule = experiment.task, experiment.settings, experiment.strategy
    bound = run.device_memory
    if bound is None and task.device.type == "cuda":
        bound = torch.cuda.mem_get_info(task.device)[1]
    size = experiment.num_participants * task.shared.size * task.dtype.itemsize
    whole = why is None or experiment.foreign is not None or "mimic" in getattr(rule, "needs", ())
    whole |= experiment.uplink is not None and experiment.uplink.needs_rows is not None
    if whole or bound is None or 2 * size <= bound:
        return {"on": "device"}
    return {"on": "host", "block_bytes": bound // 8}


def _needs_rows(experiment: Experiment, evaluation: Evaluation) -> str | None:
    """Say who needs the rows of the updates; None lets the engine sum them as they come."""
    rule = experiment.strategy
    if not isinstance(rule, LinearRule):
        return type(rule).__name__
    if getattr(rule, "needs_rows", False):
        return type(rule).__name__
    if experiment.uplink is not None and experiment.uplink.needs_rows:
        return experiment.uplink.needs_rows
    if evaluation.cosines:
        return "metrics.cosines"
    if evaluation.decomposition_every:
        return "metrics.decomposition_every"
    return None


def check_evaluation(experiment: Experiment) -> None:
    """Refuse what could never be evaluated, and stops that could never be reached: they would pass in silence."""
    run = experiment.settings
    own = {LOCAL: "parameters", BUFFER: "running statistics"}
    personal = next((own[p] for p in own if any(name.startswith(p) for name in experiment.task.store.first)), None)
    asked = {"target_accuracy": run.target_accuracy, "early_stopping.patience": run.early_stopping.patience}
    stops = [name for name, value in asked.items() if value is not None]
    for name in stops:
        if not len(experiment.dataset.splits.get("validation", ())):
            raise UserError(f"{name} reads the validation split, which is empty: set data.validation above 0")
    x = experiment.task.x
    if experiment.evaluation.robust_radius and not x.is_floating_point():
        raise UserError(f"metrics.robust_radius needs floating-point features, this data has {x.dtype}; set it to 0")
    if personal is None:
        return
    if experiment.evaluation.decomposition_every:
        stops.append("metrics.decomposition_every")
    for name in stops:
        raise UserError(f"{name} needs one global model, but here clients keep {personal}")
    if not (experiment.splits.test.sizes[~experiment.splits.held_out] > 0).any():
        raise UserError(f"clients keep {personal}, so each is evaluated on its own test data: set partition.local_test")


def check_cohort(experiment: Experiment) -> None:
    """Refuse cohorts that nobody can draw, and rules that need more clients than there are."""
    if not len(experiment.participants):
        raise UserError("partition: no client may train: all are held out or have no samples")
    if not experiment.task.shared.size and not hasattr(experiment.strategy, "local_parameters"):
        raise UserError("model.local keeps every parameter with the clients: nothing is shared; use strategy=local")
    rule = experiment.strategy
    if hasattr(rule, "check"):
        try:
            rule.check(experiment.num_participants)
        except ValueError as error:
            raise UserError(f"strategy: {error}") from error
    if hasattr(experiment.sampler, "check"):
        try:
            experiment.sampler.check(experiment.cohort_size, experiment.participants)
        except ValueError as error:
            raise UserError(f"sampler: {error}") from error


@dataclass(frozen=True)
class CheckpointCost:
    """How often to store the state: every round where its cost is a twentieth of the round's or less.

    Counted, not timed, so that the same config stores in the same rounds on every machine: 100 µs a local step,
    2·10¹⁰ operations a second, 8 ms and 1 ns a byte a checkpoint: its files are forced to the disk, and the clients'
    rows in it are read again when the run ends.
    """

    steps: float  # local steps a round
    samples: float  # samples passed forward and backward a round
    parameters: int
    bytes: int  # of a checkpoint

    def every(self) -> int:
        """Return the rounds between checkpoints, ≥ 1."""
        work = self.steps * 1e-4 + 6 * self.parameters * self.samples / 2e10
        return max(1, math.ceil((8e-3 + self.bytes * 1e-9) / (0.05 * work)))
