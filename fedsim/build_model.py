"""From a composed config to a model, the task that clients train on, and the weights that round 1 starts from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.children import num_cores
from fedsim.config import Config, instantiate, plain
from fedsim.construct import locate
from fedsim.contracts import Dataset, Partition
from fedsim.data.kept import placed
from fedsim.engine.blame import users_line
from fedsim.engine.store import ClientStore
from fedsim.engine.task import BUFFER, LOCAL, Task
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining, moving
from fedsim.models.dropout import replace_dropout
from fedsim.models.parameters import Parameters, initialise, load_init, split_parameters
from fedsim.settings import Run
from fedsim.threads import take_threads

# Forward operations of a batch from which a second thread gains more than it costs to wake and wait for.
THREADS_PAY = 2e7


def build_model(
    config: Config, parts: Mapping[str, Any], dataset: Dataset, run: Run, strategy: Any
) -> tuple[nn.Module, Parameters]:
    """Return the model of a run and which of its parameters travel, stay, or are frozen."""
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
        model = initialise(factory, seed_of(shared["seed"], run))
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


def build_task(
    dataset: Dataset, partition: Partition, model: nn.Module, names: Parameters, client: tuple[Any, LocalTraining],
    run: Run,
) -> Task:  # fmt: skip
    """Return what all rounds share, and set how many threads torch uses."""
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
        work = probe(model, x, dataset.num_classes) * (training.batch_size or int(partition.sizes.max()))
    except Exception as error:
        shape = tuple(x.shape[1:])
        hint = "" if x.is_floating_point() else "; these are tokens: choose model=char_gru, or a model that embeds them"
        raise UserError(f"model: it does not take inputs of shape {shape}: {users_line(error)}{hint}") from error
    take_threads(run.threads or (num_cores() if work >= THREADS_PAY else 1))
    task = Task(
        module=model, shared=names.shared, local=names.local, buffers=names.buffers, objective=objective,
        training=training, x=x, y=placed(dataset.y, x.device, dataset.y.dtype), partition=partition,
        store=ClientStore(partition.num_clients, first, memory=run.client_state_bytes), seed=run.seed,
        augment=dataset.augment, precision=run.precision,
    )  # fmt: skip
    try:
        for phase in task.phases:
            moving([*names.shared.names, *names.local.names], phase)
    except ValueError as error:
        raise UserError(f"client: {error}") from error
    return task


@torch.no_grad()
def probe(model: nn.Module, x: Tensor, num_classes: int) -> float:
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


def initial_weights(model: nn.Module, layout: Layout) -> Tensor:
    """Return the weights (D,) that round 1 starts from."""
    own = dict(model.named_parameters())
    like = next(iter(own.values()))
    return layout.join({name: own[name].detach() for name in layout.names}).to(like.device, like.dtype)


def initial_buffers(model: nn.Module, layout: Layout) -> Tensor:
    """Return the buffers that round 1 starts from, joined."""
    buffers = dict(model.named_buffers())
    like = next(model.parameters())
    return layout.join({name: buffers[name].detach().to(like.dtype) for name in layout.names}).to(like.device)


def seed_of(own: int | None, run: Run) -> int:
    """Return a part's own seed, or the run's where it has none."""
    return run.seed if own is None else own
