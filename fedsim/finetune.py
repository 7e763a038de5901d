"""Evaluation after a few local steps: what the model is worth to a client that adapts it to itself.

Where models have personal parameters, these alone are adapted; else the whole model is. The steps are those of the
cross-entropy, which an objective may turn: Ditto holds personal models near the global one. A client that trains adapts
on its own training samples; a held-out one, all of whose samples are for testing, on a half that is then not tested.
Nothing that is adapted here is kept: a run with it has the weights of a run without.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.contracts import Context, Partition, Phase
from fedsim.data.splits import ClientSplits
from fedsim.engine.evaluate import predict, untrained
from fedsim.engine.sequential import Sequential
from fedsim.engine.task import BUFFER, LOCAL, Job, Task
from fedsim.layout import Params
from fedsim.local import Int64
from fedsim.rng import keyed_bits


@dataclass(frozen=True)
class _Adapt:
    """Cross-entropy that moves the named parameters, or all; leading axes of the logits are models, and add up."""

    names: Sequence[str]

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        labels = targets.expand(logits.shape[:-1]).flatten()  # (… · B,)
        losses = functional.cross_entropy(logits.flatten(0, -2), labels, reduction="none")  # (… · B,)
        return (losses.view(-1, weights.shape[0]) @ weights).sum()

    def phases(self) -> tuple[Phase | None, ...]:
        if not self.names:
            return (None,)
        return (Phase(params="|".join(f"^{re.escape(name)}$" for name in self.names)),)


@dataclass(frozen=True)
class _Turned(_Adapt):
    """The same, with directions that an objective gives."""

    turn: Callable[[Params, Mapping[str, Tensor], Context], tuple[Params, dict[str, Tensor]]]

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        return self.turn(grads, params, context)


class FineTuner:
    """Adapts each client's model for some local steps and tests it.

    Args:
        task: model, data and what clients keep.
        splits: whose samples are whose.
        num_steps: local steps ≥ 1, by the clients' own optimiser at its first rate, batches of their size.

    """

    def __init__(self, task: Task, splits: ClientSplits, num_steps: int) -> None:
        self.store, self.whole = task.store, task
        self.adapt, self.test = adaptation_splits(splits, task.seed)
        self.clients: Int64 = np.flatnonzero((self.adapt.sizes > 0) & (self.test.sizes > 0))
        turn = getattr(task.objective, "adapt_direction", None)
        self.task = replace(
            task,
            module=copy.deepcopy(task.module),  # the engine makes a module's tensors its own
            objective=_Turned(task.local.names, turn) if turn else _Adapt(task.local.names),
            training=replace(task.training, local_steps=num_steps),
            partition=self.adapt,
            views={},
        )
        self.engine = Sequential(self.task)

    def accuracies(self, weights: Tensor, buffers: Tensor, round: int) -> tuple[Tensor, Tensor]:
        """Return the accuracy (C,) of each of `clients` (C,) after its steps, and its number of test samples (C,).

        Args:
            weights: (D,) after a round.
            buffers: likewise.
            round: whose samples are adapted to and tested.

        """
        found = [self._accuracy(client, weights, buffers, round) for client in self.clients.tolist()]
        sizes = torch.from_numpy(self.test.sizes[self.clients])  # (C,)
        return torch.stack(found).cpu() if found else torch.zeros(0), sizes

    def _accuracy(self, client: int, weights: Tensor, buffers: Tensor, round: int) -> Tensor:
        task, ids = self.task, np.array([client])
        kept = self.store.get(ids, task.device)
        kept |= {LOCAL + name: value[None] for name, value in untrained(self.whole, client, weights).items()}
        job = Job(
            clients=ids, received=np.full(1, round - 1), models={round - 1: weights}, broadcasts={}, buffers=buffers,
            state={name: value for name, value in kept.items() if name.startswith((LOCAL, BUFFER))},
            round=1, key=0, lr=task.training.lr,
        )  # fmt: skip
        moved = torch.empty(1, task.shared.size, dtype=task.dtype, device=task.device)  # (1, D)
        block = self.engine.train(job, moved)
        tested = self.test.of(client) if task.shift is None else task.shift(self.test.of(client), round)
        positions = torch.from_numpy(tested).to(task.device)
        local = {name: block.state[LOCAL + name][0] for name in task.local.names}
        return (
            predict(task, weights + moved[0], positions, buffers=block.buffers[0], local=local).correct.double().mean()
        )


def adaptation_splits(splits: ClientSplits, seed: int) -> tuple[Partition, Partition]:
    """Return what each client adapts to and what it is tested on after that; a held-out client's halves are keyed."""
    adapt, test = [], []
    for client in range(splits.test.num_clients):
        mine = splits.test.of(client)
        if splits.held_out[client]:
            mine = mine[np.argsort(keyed_bits(seed, "finetune", mine))]
            adapt.append(np.sort(mine[: len(mine) // 2]))
            test.append(np.sort(mine[len(mine) // 2 :]))
        else:
            adapt.append(splits.train.of(client))
            test.append(mine)
    return _partition(adapt), _partition(test)


def _partition(parts: Sequence[Int64]) -> Partition:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Partition(np.concatenate(parts).astype(np.int64), offsets)
