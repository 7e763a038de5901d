"""One pass over samples under given weights, in batches of a size that the plan fixes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fedsim.engine.task import BUFFER, LOCAL, Task
from fedsim.metrics.classification import Outputs, outputs

EVALUATION_ENTRIES = 1 << 22  # input entries of one evaluation batch


def batch_size(task: Task) -> int:
    """Return how many samples one evaluation batch holds: a function of the shapes alone."""
    return max(1, min(4096, EVALUATION_ENTRIES // max(1, task.x[0].numel())))


def own_parts(task: Task, client: int, buffers: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return what a client's model has of its own: personal parameters by name, and its buffers or the server's."""
    own = {name: value[0] for name, value in task.store.get(np.array([client]), task.device).items()}
    local = {name: own[LOCAL + name] for name in task.local.names}
    if not task.buffers.size or BUFFER + task.buffers.names[0] not in own:
        return local, buffers
    return local, task.buffers.join({name: own[BUFFER + name].to(buffers.dtype) for name in task.buffers.names})


@torch.no_grad()
def predict(
    task: Task,
    weights: Tensor,
    positions: Tensor,
    *,
    buffers: Tensor | None = None,
    local: Mapping[str, Tensor] | None = None,
) -> Outputs:
    """Evaluate weights (D,) on samples (n,) of the task's data; per-sample outputs, in order.

    Args:
        task: model and data.
        weights: shared parameters.
        positions: (n,) int64 on the device, may be empty.
        buffers: of the model; None keeps the module's.
        local: personal parameters by name; None keeps the module's.

    """
    params = task.shared.split(weights)
    if local:
        params.update(local)
    if buffers is not None and task.buffers.size:
        own = dict(task.module.named_buffers())
        params.update({n: v.to(own[n].dtype) for n, v in task.buffers.split(buffers).items()})
    was_training = task.module.training
    task.module.eval()
    try:
        parts = [
            outputs(functional_call(task.module, params, (task.x.index_select(0, chosen),)), task.y[chosen])
            for chosen in torch.split(positions, batch_size(task))
        ]
    finally:
        task.module.train(was_training)
    return parts[0] if len(parts) == 1 else Outputs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
