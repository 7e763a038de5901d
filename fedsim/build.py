"""From a composed config, or from objects, to an experiment: every mistake is found here, before round 1."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.build_uplink import build_adversary, build_uplink, check_uplink
from fedsim.config import Config, instantiate, plain, settings
from fedsim.construct import locate
from fedsim.contracts import Dataset, Partition
from fedsim.data.check import check_dataset
from fedsim.data.kept import kept, placed
from fedsim.data.splits import ClientSplits, chosen, split_clients, validation_split
from fedsim.engine.mimic import Mimic
from fedsim.engine.precision import refusal, set_tf32
from fedsim.engine.processes import start_server
from fedsim.engine.shared import share
from fedsim.engine.store import ClientStore
from fedsim.engine.task import BUFFER, LOCAL, Task
from fedsim.errors import UserError
from fedsim.experiment import Experiment, cohort_size
from fedsim.flower.client import FlowerApp
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.dropout import replace_dropout
from fedsim.models.parameters import Parameters, initialise, load_init, split_parameters
from fedsim.plan import check_cohort, check_evaluation, planned, planned_engine
from fedsim.rng import generator
from fedsim.settings import Run
from fedsim.timing import timed

Parts = Mapping[str, Any]
# Forward operations of a batch from which a second thread gains more than it costs to wake and wait for.
THREADS_PAY = 2e7
TRAINING = tuple(LocalTraining.__dataclass_fields__)


def build(config: Config, parts: Parts | None = None, saved: Mapping[str, Any] | None = None) -> Experiment:
    """Build everything that a run needs.

    Args:
        config: as `fedsim.config.compose` returns it.
        parts: objects that stand in for groups: data (a Dataset), partition, model (an nn.Module or a function that
            returns one), client (an objective), training (a LocalTraining), strategy, sampler, attack, compressor.
        saved: the plan of the run that is gone on with: threads, engine and rhythms are taken from it.

    Raises:
        UserError: anything that cannot be run, in one line.

    """
    parts = parts or {}
    _check_parts(parts)
    run = settings(config)
    device, dtype = _machine(run)
    dataset, partition, local = _shared_data(config, parts, device)
    splits = local.at(dataset.splits["train"])
    adversary = build_adversary(config, parts, splits, run.seed)
    if adversary is not None:
        dataset = adversary.poison(dataset, splits.train)
    client, training = _client(config, parts)
    strategy = _bound(parts.get("strategy") or _strategy(config, splits, run), local_training=training)
    if getattr(strategy, "local_buffers", False):
        run = replace(run, buffers="client")
    model, names = _model(config, parts, dataset, run, strategy)
    train = splits.train
    if getattr(strategy, "pooled", False):
        train = Partition(train.indices, np.array([0, len(train.indices)]))
    task = _task(dataset, train, model.to(device, dtype), names, (client, training), run)
    uplink = build_uplink(config, parts, task, adversary)
    if "mimic" in getattr(strategy, "needs", ()):
        strategy = _bound(strategy, mimic=Mimic.of(task))
    initial, buffers = _initial(model, names.shared), _initial_buffers(model, names.buffers)
    cohort = cohort_size(run.fraction, int((task.partition.sizes > 0).sum()))
    # From here on the module's tensors are the engine's.
    threads = run.threads or num_cores()
    engine, reason = planned_engine(task, plain(config.engine), cohort=cohort, threads=threads, saved=saved)
    sampler = parts.get("sampler") or instantiate(_without(config.sampler, "seed"), "sampler")
    evaluation = parts.get("metrics") or instantiate(config.metrics)
    tracker = parts.get("tracker") or instantiate(config.tracker)
    mode = parts.get("mode") or instantiate(config.mode)
    experiment = Experiment(
        settings=run, dataset=dataset, partition=partition, local=local, splits=splits, task=task, engine=engine,
        strategy=strategy, sampler=sampler, mode=mode, evaluation=evaluation, initial=initial, initial_buffers=buffers,
        sampler_seed=_seed(config.sampler.seed, run), plan={"why": reason}, config={}, tracker=tracker, uplink=uplink,
    )  # fmt: skip
    if isinstance(client, FlowerApp):
        clients = client.clients(
            task.shared, splits.train.num_clients, seed=run.seed, on_client_error=run.on_client_error
        )
        experiment = replace(experiment, foreign=clients)
    if uplink is not None:
        check_uplink(uplink, strategy, foreign=experiment.foreign is not None)
    experiment = timed(experiment, config, parts)
    experiment = planned(experiment, plain(config), saved)
    check_cohort(experiment)
    check_evaluation(experiment)
    return experiment


def _shared_data(config: Config, parts: Parts, device: torch.device) -> tuple[Dataset, Partition, ClientSplits]:
    """Load the data, where processes train into the one copy that all of them see."""
    if config.engine.name != "processes":
        return data(config, parts)
    start_server()  # workers load while the data does
    dataset, partition, local = data(config, parts)
    if device.type == "cpu":
        dataset = dataset._replace(x=share(dataset.x), y=share(dataset.y))
    return dataset, partition, local


def data(config: Config, parts: Parts | None = None) -> tuple[Dataset, Partition, ClientSplits]:
    """Load the data and draw the partition; both its parts hold positions into the training split."""
    parts = parts or {}
    run = settings(config)
    dataset = parts.get("data")
    if not isinstance(dataset, Dataset):
        source = _without(config.data, "validation")
        dataset = dataset() if callable(dataset) else kept(source, lambda: instantiate(source, "data"))
    dataset = check_dataset(dataset)
    seed = _seed(config.partition.seed, run)
    try:
        dataset = validation_split(dataset, config.data.validation, seed)
        partitioner = parts.get("partition") or instantiate(
            _without(config.partition, "seed", "held_out_clients", "local_validation", "local_test"), "partition"
        )
        train = dataset.splits["train"]
        column = dataset.domain if getattr(partitioner, "natural_from", "client") == "domain" else dataset.client
        labels = chosen(dataset.y.numpy(), train)
        drawn = partitioner(labels, generator(seed, "partition"), None if column is None else column[train])
        local = split_clients(
            drawn, labels, held_out_clients=config.partition.held_out_clients,
            local_validation=config.partition.local_validation, local_test=config.partition.local_test, seed=seed,
        )  # fmt: skip
        if hasattr(partitioner, "corrupt"):
            touched = local.at(train).join(*getattr(partitioner, "corrupts", ("train", "validation", "test")))
            dataset = partitioner.corrupt(dataset, touched, generator(seed, "corrupt"))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"partition: {error}") from error
    return dataset, drawn, local


def _check_parts(parts: Parts) -> None:
    """Refuse objects that are not what their group asks for."""
    wanted: dict[str, tuple[str, Callable[[Any], bool]]] = {
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
            "a rule or a Flower strategy",
            lambda given: hasattr(given, "init") or hasattr(given, "configure_train"),
        ),
        "training": ("a fedsim.local.LocalTraining", lambda given: isinstance(given, LocalTraining)),
    }
    for name, (what, fits) in wanted.items():
        value = parts.get(name)
        if value is None:
            continue
        if isinstance(value, type) and name in ("client", "strategy", "training"):
            raise UserError(f"{name} must be {what}, got the class {value.__name__}: call it")
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


def _strategy(config: Config, splits: ClientSplits, run: Run) -> Any:
    node = plain(config.strategy)
    if "num_sampled_clients" in node and node["num_sampled_clients"] is None:  # Flower's DP wrappers want it at once
        node["num_sampled_clients"] = cohort_size(run.fraction, int((splits.train.sizes > 0).sum()))
    return instantiate(node, "strategy")


def _bound(strategy: Any, **known: Any) -> Any:
    """Give a rule the values that it asks for by name."""
    wanted = {name: known[name] for name in getattr(strategy, "needs", ()) if name in known}
    return strategy.bind(**wanted) if wanted else strategy


def _client(config: Config, parts: Parts) -> tuple[Any, LocalTraining]:
    node = plain(config.client)
    mine = {name: node.pop(name) for name in TRAINING if name in node}
    training = parts.get("training")
    if training is None:
        training = instantiate({"_target_": "fedsim.local.LocalTraining", **mine}, "client")
    objective = parts.get("client") or instantiate(node, "client")
    return objective, training


def _model(config: Config, parts: Parts, dataset: Dataset, run: Run, strategy: Any) -> tuple[nn.Module, Parameters]:
    node = plain(config.model)
    shared = {name: node.pop(name, None) for name in ("seed", "init", "trainable", "local")}
    given = parts.get("model")
    if isinstance(given, nn.Module):
        model = copy.deepcopy(given)  # the caller's own stays as it is
    else:
        target = given or locate(node["_target_"], "model._target_")
        known = {"input_shape": tuple(dataset.x.shape[1:]), "num_classes": dataset.num_classes}
        extra = {name: value for name, value in known.items() if _takes(target, name) and name not in node}
        factory = (lambda: given(**extra)) if given else (lambda: instantiate(node, "model", **extra))
        model = initialise(factory, _seed(shared["seed"], run))
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {node.get('_target_')} must return an nn.Module, got {type(model).__name__}")
    model = replace_dropout(model)
    if shared["init"]:
        load_init(model, shared["init"])
    if adapt := getattr(strategy, "adapt_model", None):
        model = adapt(model)
    local = shared["local"] or getattr(strategy, "local_parameters", None)
    local = local(model) if callable(local) else local
    names = split_parameters(model, trainable=shared["trainable"], local=local)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names.frozen)
    return model, names


def _takes(target: Any, name: str) -> bool:
    return name in inspect.signature(target).parameters


def _task(
    dataset: Dataset, partition: Partition, model: nn.Module, names: Parameters, client: tuple[Any, LocalTraining],
    run: Run,
) -> Task:  # fmt: skip
    parameter = next(model.parameters())
    x = placed(dataset.x, parameter.device, parameter.dtype if dataset.x.is_floating_point() else dataset.x.dtype)
    objective, training = client
    own = dict(model.named_parameters())
    first = {LOCAL + name: own[name].detach().clone() for name in names.local.names}
    if run.buffers == "client":
        buffers = dict(model.named_buffers())
        first |= {BUFFER + name: buffers[name].detach().clone() for name in names.buffers.names}
    if hasattr(objective, "init_client"):
        kept = objective.init_client(names.shared)
        first |= {name: t.to(parameter.dtype) if t.is_floating_point() else t for name, t in kept.items()}
    try:
        work = _probe(model, x, dataset.num_classes) * (training.batch_size or int(partition.sizes.max()))
    except Exception as error:
        shape = tuple(x.shape[1:])
        hint = "" if x.is_floating_point() else "; these are tokens: choose model=char_gru, or a model that embeds them"
        raise UserError(
            f"model: it does not take inputs of shape {shape}: {(str(error).splitlines() or [''])[0]}{hint}"
        ) from error
    torch.set_num_threads(run.threads or (num_cores() if work >= THREADS_PAY else 1))
    return Task(
        module=model, shared=names.shared, local=names.local, buffers=names.buffers, objective=objective,
        training=training, x=x, y=placed(dataset.y, x.device, dataset.y.dtype), partition=partition,
        store=ClientStore(partition.num_clients, first, memory=run.client_state_bytes), seed=run.seed,
        augment=dataset.augment, precision=run.precision,
    )  # fmt: skip


@torch.no_grad()
def _probe(model: nn.Module, x: Tensor, num_classes: int) -> float:
    """Run two samples, so that a model that does not fit its data is found at once.

    Returns:
        Operations a sample of its products: 2 · weights · positions for each linear layer and convolution. Torch's own
        counter is exact, but takes a second to import.

    """
    counted = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        weight = layer.get_parameter("weight")
        counted.append(2 * weight.numel() * output.numel() / weight.shape[0])

    products = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    hooks = [layer.register_forward_hook(count) for layer in products]
    model.eval()
    try:
        logits = model(x[:2])
    finally:
        for hook in hooks:
            hook.remove()
    expected = (len(x[:2]), num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"it must return logits of shape {expected}, got {got}")
    return float(sum(counted)) / len(x[:2])


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _initial(model: nn.Module, layout: Layout) -> Tensor:
    own = dict(model.named_parameters())
    like = next(iter(own.values()))
    return layout.join({name: own[name].detach() for name in layout.names}).to(like.device, like.dtype)


def _initial_buffers(model: nn.Module, layout: Layout) -> Tensor:
    buffers = dict(model.named_buffers())
    like = next(model.parameters())
    return layout.join({name: buffers[name].detach().to(like.dtype) for name in layout.names}).to(like.device)


def _seed(own: int | None, run: Run) -> int:
    return run.seed if own is None else own


def _without(node: Config, *names: str) -> dict[str, Any]:
    """Return a group's own arguments, without the ones that all of its choices share."""
    return {name: value for name, value in plain(node).items() if name not in names}
