"""From a composed config, or from objects, to an experiment: every mistake is found here, before round 1."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedsim.build_data import build_data, own
from fedsim.build_model import build_model, build_task, initial_buffers, initial_weights, seed_of
from fedsim.build_uplink import build_uplink, check_uplink
from fedsim.children import num_cores
from fedsim.config import Config, instantiate, plain, settings
from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import ClientSplits
from fedsim.engine.mimic import Mimic
from fedsim.engine.precision import refusal, set_tf32
from fedsim.engine.task import Task, placed
from fedsim.errors import UserError, blamed
from fedsim.experiment import Experiment, cohort_size
from fedsim.local import LocalTraining
from fedsim.modes.sync import Sync
from fedsim.plan import check_cohort, check_evaluation, planned, planned_engine
from fedsim.samplers import Poisson
from fedsim.settings import Run
from fedsim.timing import timed

Parts = Mapping[str, Any]
TRAINING = tuple(LocalTraining.__dataclass_fields__)
# What a group's object has to be, in words and as a test.
WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data": (
        "a fedsim.contracts.Dataset or a function that returns one",
        lambda given: isinstance(given, Dataset) or callable(given),
    ),
    "model": ("an nn.Module or a function that returns one", callable),
    "client": (
        "an objective with `criterion` or `loss`",
        lambda given: any(hasattr(given, name) for name in ("criterion", "loss", "clients")),
    ),
    "strategy": (
        "a rule, which has `init` and `__call__`, or a Flower strategy",
        lambda given: (callable(given) and hasattr(given, "init")) or hasattr(given, "configure_train"),
    ),
    "training": ("a fedsim.local.LocalTraining", lambda given: isinstance(given, LocalTraining)),
}


def build(
    config: Config, parts: Parts | None = None, saved: Mapping[str, Any] | None = None, *, beside: int = 1
) -> Experiment:
    """Build everything that a run needs.

    Args:
        config: as `fedsim.config.compose` returns it.
        parts: objects that stand in for groups: data (a Dataset), partition, model (an nn.Module or a function that
            returns one), client (an objective), training (a LocalTraining), strategy, sampler, attack, compressor.
        saved: the plan of the run that is gone on with: threads, engine and rhythms are taken from it.
        beside: runs that are to train as one program with this one, itself among them.

    Raises:
        UserError: anything that cannot be run, in one line.

    """
    parts = parts or {}
    _check_parts(parts)
    run = settings(config)
    device, dtype = _machine(run)
    built = build_data(config, parts, share_samples=device.type == "cpu")
    dataset, partition, local, splits, adversary = built[:5]
    client, training = _client(config, parts)
    with blamed("strategy"):
        strategy = _bound(_strategy(config, parts, splits, run), local_training=training)
        if getattr(strategy, "local_buffers", False):
            run = replace(run, buffers="client")
        model, names = build_model(config, parts, dataset, run, strategy)
    train = _pooled(splits.train) if getattr(strategy, "pooled", False) else splits.train
    task = build_task(dataset, train, model.to(device, dtype), names, (client, training), run)
    task = replace(task, shift=built.shift)
    uplink = build_uplink(config, parts, task, adversary)
    _check_halves(strategy, client, None if uplink is None else uplink.compressor)
    mimic = Mimic.of(task) if "mimic" in getattr(strategy, "needs", ()) else None
    if mimic is not None:
        strategy = _bound(strategy, mimic=mimic)
    initial, buffers = initial_weights(model, names.shared), initial_buffers(model, names.buffers)
    task = replace(task, told=_first_broadcast(strategy, task))
    cohort = cohort_size(run.fraction, int((task.partition.sizes > 0).sum()))
    # From here on the module's tensors are the engine's.
    engine, reason = planned_engine(
        task, plain(config.engine), cohort=cohort, threads=run.threads or num_cores(), saved=saved, beside=beside
    )
    sampler = parts.get("sampler") or instantiate(own(config.sampler, "seed"), "sampler")
    evaluation = parts.get("metrics") or instantiate(config.metrics)
    tracker = parts.get("tracker") or instantiate(config.tracker)
    mode = parts.get("mode") or instantiate(config.mode)
    experiment = Experiment(
        settings=run, dataset=dataset, partition=partition, local=local, splits=splits, task=task, engine=engine,
        strategy=strategy, sampler=sampler, mode=mode, evaluation=evaluation, initial=initial, initial_buffers=buffers,
        sampler_seed=seed_of(config.sampler.seed, run), plan={"why": reason}, config={}, tracker=tracker, uplink=uplink,
        mimic=mimic,
    )  # fmt: skip
    if _is_app(client):
        clients = client.clients(
            task.shared, splits.train.num_clients, seed=run.seed, on_client_error=run.on_client_error
        )
        if built.shift is not None:
            raise UserError("shift replaces the samples of fedsim's own clients; with client=flower_app use shift=none")
        experiment = replace(experiment, foreign=clients)
    if uplink is not None:
        check_uplink(uplink, strategy, foreign=experiment.foreign is not None)
    experiment = planned(_informed(timed(experiment, config, parts)), plain(config), saved)
    check_cohort(experiment)
    check_evaluation(experiment)
    return experiment


def _check_parts(parts: Parts) -> None:
    """Refuse objects that are not what their group asks for."""
    for name, value in parts.items():
        if name in WANTED and value is not None:
            _check_part(name, value)


def _check_part(name: str, value: Any) -> None:
    what, fits = WANTED[name]
    if isinstance(value, type) and name in ("client", "strategy", "training"):
        raise UserError(f"{name} must be {what}, got the class {value.__name__}: call it")
    if isinstance(value, dict):
        raise UserError(f"{name} must be {what}, got a YAML file without _target_")
    if not fits(value):
        raise UserError(f"{name} must be {what}, got {type(value).__name__}")


def _machine(run: Run) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype, and make kernels deterministic there."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    name = automatic if run.device == "auto" else run.device
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"device={run.device}: this machine has no CUDA device; use device=cpu")
        index = torch.device(name).index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"device={run.device}: this machine has {torch.cuda.device_count()} CUDA devices")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        set_tf32(run.precision)
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nobody here reads what was never written; filling every new array would cost a launch each.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (not among torch's typed names)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has no Metal device; use device=cpu")
    device, dtype = torch.device(name), getattr(torch, run.dtype)
    if reason := refusal(run.precision, device, dtype):
        raise UserError(reason)
    return device, dtype


def _strategy(config: Config, parts: Parts, splits: ClientSplits, run: Run) -> Any:
    if parts.get("strategy") is not None:
        return parts["strategy"]
    node = plain(config.strategy)
    if "num_sampled_clients" in node and node["num_sampled_clients"] is None:  # Flower's DP wrappers want it at once
        node["num_sampled_clients"] = cohort_size(run.fraction, int((splits.train.sizes > 0).sum()))
    strategy = instantiate(node, "strategy")
    _check_part("strategy", strategy)
    return strategy


def _bound(strategy: Any, **known: Any) -> Any:
    """Give a rule the values that it asks for by name."""
    wanted = {name: known[name] for name in getattr(strategy, "needs", ()) if name in known}
    return strategy.bind(**wanted) if wanted else strategy


def _informed(experiment: Experiment) -> Experiment:
    """Tell a strategy that asks the run's fraction, and what keeps clients from taking part independently."""
    known = {"dependence": _dependence(experiment), "fraction": experiment.settings.fraction}
    with blamed("strategy"):
        return replace(experiment, strategy=_bound(experiment.strategy, **known))


def _dependence(experiment: Experiment) -> str | None:
    """Return why a client's part in a round hangs on other clients', or is not of one probability; None: it does not.

    Where all train in every round no sampler draws anything.
    """
    mode, availability, sampler = experiment.mode, experiment.clock.availability, experiment.sampler
    if not isinstance(mode, Sync):
        return f"mode {type(mode).__name__}"
    if availability is not None:
        return f"availability {type(availability).__name__}"
    drawn = experiment.cohort_size < len(experiment.participants)
    return f"sampler {type(sampler).__name__}" if drawn and not isinstance(sampler, Poisson) else None


def _client(config: Config, parts: Parts) -> tuple[Any, LocalTraining]:
    node = plain(config.client)
    mine = {name: node.pop(name) for name in TRAINING if name in node}
    training = parts.get("training")
    if training is None:
        training = instantiate({"_target_": "fedsim.local.LocalTraining", **mine}, "client")
    objective = parts.get("client") or instantiate(node, "client")
    return objective, training


def _pooled(partition: Partition) -> Partition:
    """Return the partition in which one client has all samples."""
    return Partition(partition.indices, np.array([0, len(partition.indices)]))


def _first_broadcast(strategy: Any, task: Task) -> Mapping[str, Any]:
    """Return what a rule sends with the model of round 1, as clients will see it."""
    if not callable(strategy):  # a Flower strategy
        return {}
    with blamed("strategy"):
        state = strategy.init(task.shared, int((task.partition.sizes > 0).sum()))
    return placed(task, strategy.broadcast(state)) if hasattr(strategy, "broadcast") else {}


def _is_app(client: Any) -> bool:
    """Say whether clients are a Flower app's, whose class is loaded with Flower."""
    return hasattr(client, "clients")


def _check_halves(strategy: Any, client: Any, compressor: Any) -> None:
    """Refuse one half of a method without the other: it would train, and be another method."""
    if _is_app(client):  # whose clients do what they like
        return
    parts = {"strategy": strategy, "client": client, "compressor": compressor}
    halves = {group: half for group, part in parts.items() if (half := getattr(part, "half_of", None))}
    for group, half in halves.items():
        if list(halves.values()).count(half) < 2:
            raise UserError(f"{group}: {type(parts[group]).__name__} is one half of a method; choose both: {half}")
