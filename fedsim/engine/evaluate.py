"""One pass over samples under given weights, in batches of a size that the plan fixes."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.engine.task import BUFFER, LOCAL, Task
from fedsim.metrics.classification import Outputs, outputs
from fedsim.metrics.robust import Adversary

EVALUATION_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}  # of the largest layer's values of one evaluation batch

_widest: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # module → entries of its largest value of a sample


def batch_size(task: Task) -> int:
    """Return how many samples one evaluation batch holds: a function of the shapes alone.

    An evaluation keeps a few layers' values where training keeps all, so that it needs no more memory.
    """
    most = EVALUATION_ENTRIES["cuda" if task.device.type == "cuda" else "cpu"]
    return max(1, min(4096, most // _entries(task)))


def _entries(task: Task) -> int:
    """Return the entries of the largest value of one sample: its input, or what a layer makes of it."""
    if task.module not in _widest:
        sizes = [1, task.x[0].numel()]

        def note(layer: nn.Module, given: object, value: object) -> None:
            if isinstance(value, Tensor):
                sizes.append(value.numel())

        hooks = [layer.register_forward_hook(note) for layer in task.module.modules()]
        try:
            with torch.no_grad():
                task.module(task.x[:1])
        finally:
            for hook in hooks:
                hook.remove()
        _widest[task.module] = max(sizes)
    return _widest[task.module]


def own_parts(task: Task, client: int, weights: Tensor, buffers: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what a client's model has of its own: personal parameters by name, and its buffers or the server's."""
    own = {name: value[0] for name, value in task.store.get(np.array([client]), task.device).items()}
    local = {name: own[LOCAL + name] for name in task.local.names}
    local |= untrained(task, client, weights)
    if not task.buffers.size or BUFFER + task.buffers.names[0] not in own:
        return local, buffers
    return local, task.buffers.join({name: own[BUFFER + name].to(buffers.dtype) for name in task.buffers.names})


def untrained(task: Task, client: int, weights: Tensor) -> dict[str, Tensor]:
    """Return what an objective makes of weights (D,) for the personal parameters of a client that never trained."""
    begin = getattr(task.objective, "untrained", None)
    if begin is None or task.store.touched[client]:
        return {}
    values: dict[str, Tensor] = begin(task.shared.split(weights))
    return values


@torch.no_grad()
def predict(
    task: Task,
    weights: Tensor,
    positions: Tensor,
    *,
    buffers: Tensor | None = None,
    local: Mapping[str, Tensor] | None = None,
    adversary: Adversary | None = None,
) -> Outputs:
    """Evaluate weights (D,) on samples (n,) of the task's data; per-sample outputs, in order.

    Args:
        task: model and data.
        weights: shared parameters.
        positions: (n,) int64 on the device, may be empty.
        buffers: of the model; None keeps the module's.
        local: personal parameters by name; None keeps the module's.
        adversary: moves the samples first; None leaves them as they are.

    """
    params = task.shared.split(weights)
    if local:
        params.update(local)
    if buffers is not None and task.buffers.size:
        own = dict(task.module.named_buffers())
        params.update({n: v.to(own[n].dtype) for n, v in task.buffers.split(buffers).items()})
    was_training = task.module.training
    task.module.eval()
    size = batch_size(task)

    def logits(x: Tensor) -> Tensor:
        values: Tensor = functional_call(task.module, params, (x,))  # (B, C)
        return values

    try:
        parts = []
        for number, chosen in enumerate(torch.split(positions, size)):
            x, y = task.x.index_select(0, chosen), task.y[chosen]
            if adversary is not None:
                x = adversary(logits, x, y, number * size)
            parts.append(outputs(logits(x), y))
    finally:
        task.module.train(was_training)
    return parts[0] if len(parts) == 1 else Outputs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
