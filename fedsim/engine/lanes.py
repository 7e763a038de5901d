"""Which way the clients of a task can be batched, found out by trying rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.batches import Step
from fedsim.engine.blame import batching, users_line
from fedsim.engine.fused import convert
from fedsim.engine.gradients import FusedGradient, GenericGradient, Gradient
from fedsim.engine.model import Functional, sibling
from fedsim.engine.situation import Situation
from fedsim.engine.task import BUFFER, LOCAL, Task
from fedsim.engine.unrolled import unrolled
from fedsim.layout import Params


def lanes(task: Task, kernels: str, count: int, chunk: int) -> list[Gradient]:
    """Return `count` gradients that can run side by side, each on up to `chunk` rows.

    Raises:
        ValueError: the task cannot be batched that way.

    """
    if task.precision == "bf16":
        if kernels not in ("auto", "generic"):
            raise ValueError(f"kernels={kernels} compute in float32; precision=bf16 is for kernels=generic")
        kernels = "generic"
    if task.buffers.size:
        raise ValueError("the model has running statistics (batch norm?), which batched clients would share")
    mixes = mixes_samples(task)
    # A copy each: `functional_call` swaps parameters in the module it runs. First of all, for a merged forward would
    # pass over a branch on a tensor's value, which `vmap` refuses.
    copies = (unrolled(sibling(task.module)) for _ in range(count))
    generic = [GenericGradient(task, module, mixes_samples=mixes, alone=chunk == 1) for module in copies]
    rows = min(2, chunk)
    _same_logits(task, generic[0], rows)
    losses = _try_loss(task, generic[0], rows)
    if kernels != "generic" and not generic[0].whole:
        fused = [_fused(task, alone=chunk == 1) for _ in range(count)]
        if fused[0] is not None and _same_logits(task, fused[0], rows) and _same_losses(task, fused[0], losses, rows):
            return [gradient for gradient in fused if gradient is not None]
    if kernels == "fused":
        raise ValueError("kernels=fused: a layer has no fused kernel, or the objective has a loss of its own")
    return list(generic)


def _fused(task: Task, *, alone: bool) -> FusedGradient | None:
    """Return a gradient by fused kernels; None where a layer has none, or the merged forward does not run."""
    pair = convert(task.module)
    if pair is not None:
        pair[1].alone = alone
    try:
        return None if pair is None else FusedGradient(task, *pair)
    except Exception:  # it runs by itself; so it reads what fused layers do not have
        return None


def _rows(task: Task, rows: int) -> tuple[Params, Tensor]:
    """Return one or two rows of unlike weights, two samples for each: enough to tell whether rows stay apart."""
    own = dict(task.module.named_parameters())
    names = (*task.shared.names, *task.local.names)
    params = {}
    for name in names:
        value = own[name].detach()
        params[name] = torch.stack([value, 1.5 * value + 0.1][:rows])
    size = min(2, len(task.x) // 2)
    x = task.x[: rows * size]
    return params, x.view(rows, size, *x.shape[1:])


@torch.no_grad()
def mixes_samples(task: Task) -> bool:
    """Say whether a sample's logits depend on who else is in its batch."""
    task.module.eval()
    alone, together = task.module(task.x[:1]), task.module(task.x[:2])[:1]
    task.module.train()
    return not torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


@torch.no_grad()
def _same_logits(task: Task, gradient: Gradient, rows: int) -> bool:
    """Say whether rows trained together see what each would see alone.

    A forward that mixes samples, or reads weights behind the layers' backs, is no fused one.

    Raises:
        ValueError: rows cannot be batched at all; the message names the line of the model that is in the way.

    """
    params, x = _rows(task, rows)
    task.module.eval()
    try:
        model = Functional(task.module)
        alone = torch.stack([model({n: p[k] for n, p in params.items()}, x[k]) for k in range(rows)])
        try:
            together = gradient.logits(params, x)
        except Exception as error:
            if gradient.fused:
                return False
            raise ValueError(f"clients cannot be batched: {users_line(error)}") from error
    finally:
        task.module.train()
    return bool(torch.allclose(alone, together, rtol=1e-3, atol=1e-4 * float(alone.abs().max())))


def _same_losses(task: Task, gradient: FusedGradient, losses: Tensor | None, rows: int) -> bool:
    """Say whether a criterion of merged rows returns each row's own loss; None: nobody knows what those are."""
    try:
        merged = _try_loss(task, gradient, rows)
    except Exception:  # it runs by rows
        return False
    if merged is None or losses is None:
        return merged is losses
    near = merged.shape == losses.shape
    return near and bool(torch.allclose(merged, losses, rtol=1e-3, atol=1e-4 * float(losses.abs().max())))


def _try_loss(task: Task, gradient: Gradient, rows: int) -> Tensor | None:
    """Differentiate the rows' loss once, in training; return it (rows,), or None where it reads what is not known yet.

    Raises:
        ValueError: the objective asks for a tensor's value, which no batched program has.

    """
    params, x = _rows(task, rows)
    size = x.shape[1]
    samples = torch.arange(rows * size, device=task.device).view(rows, size)
    weights = torch.full((rows, size), 1 / size, dtype=task.dtype, device=task.device)
    step = Step(0, samples, samples, weights, weights.sum(1) * size, np.full(rows, size))
    own = {name: value for name, value in task.store.first.items() if not name.startswith((LOCAL, BUFFER))}
    keys = torch.zeros(rows, dtype=torch.int64, device=task.device)
    stacked: dict[str, Any] = {
        "received": {name: params[name] for name in task.shared.names},
        "client_state": {name: torch.stack([value] * rows).to(task.device) for name, value in own.items()},
        "num_steps": torch.ones(rows, dtype=torch.int64, device=task.device),
        "num_samples": torch.full((rows,), size, device=task.device),
        "key": keys,
    }
    moving = () if gradient.fused else (*task.shared.names, *task.local.names)  # fused kernels would move them at once
    gradient.begin(moving, task.training, task.training.lr, 0.0)
    try:
        return gradient(params, x, step, keys, Situation(task, 0, task.training.lr, stacked, {}))[0]
    except RuntimeError as error:
        if batching(error):
            raise ValueError(f"clients cannot be batched: {users_line(error)}") from error
        return None
    except Exception:  # it may read what the rule will send, which is not known yet: the first round will tell
        return None
