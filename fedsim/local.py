"""What a client does with a model: optimiser, rate, batches, epochs; and the order in which it sees its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.contracts import Partition, Phase
from fedsim.rng import keyed_bits, segment_permutations

Int64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """A client's local round: `local_epochs` passes (or `local_steps` steps) of mini-batch descent.

    An epoch has ceil(n/B) steps; its last batch holds what is left. Each epoch has its own order.

    Args:
        optimizer: "sgd" or "adamw" (Loshchilov & Hutter 2019; its moments start at zero in every round).
        lr: local rate > 0 of round 1.
        lr_decay: factor in (0, 1] on the rate every `lr_decay_every` rounds.
        lr_decay_every: rounds ≥ 1.
        momentum: heavy-ball factor in [0, 1) of sgd; the buffer starts at zero in every round.
        weight_decay: ≥ 0; added to the gradient by sgd, decoupled in adamw.
        batch_size: B ≥ 1; None takes all of a client's samples.
        local_epochs: passes ≥ 1 over the client's samples, where `local_steps` is None.
        local_steps: steps ≥ 1 a round, whatever the client's size; passes repeat as needed.
        clip_norm: bound > 0 on the norm of each step's gradient; None does not clip.

    """

    optimizer: str = "sgd"
    lr: float = 0.3
    lr_decay: float = 1.0
    lr_decay_every: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = 20
    local_epochs: int = 1
    local_steps: int | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in {"sgd", "adamw"}:
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        for name, low in (("lr_decay_every", 1), ("batch_size", 1), ("local_epochs", 1), ("local_steps", 1)):
            value = getattr(self, name)
            if value is None and name in {"batch_size", "local_steps"}:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay must be in (0, 1], got {self.lr_decay}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum belongs to optimizer=sgd, got {self.momentum} with {self.optimizer!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0 or null, got {self.clip_norm}")

    def rate(self, round: int) -> float:
        """Return the local rate of a round ≥ 1."""
        return self.lr * self.lr_decay ** ((round - 1) // self.lr_decay_every)

    def unroll(
        self, loss: Callable[[Tensor, int], Tensor], start: Tensor, *, rates: Tensor, proximal_mu: float = 0.0,
        create_graph: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return the updates w − start (S, D) of S local rounds by sgd, differentiable through all their steps.

        Args:
            loss: (params (S, D), step) -> (S,), each row's loss of its own parameters alone.
            start: (S, D).
            rates: (E, S) of each row's steps, 0 after its last one; see `rates_of`.
            proximal_mu: μ ≥ 0 in (μ/2)‖w − start‖².
            create_graph: False gives the same numbers without the graph.

        Raises:
            ValueError: the optimiser is not sgd: AdamW's step has no derivative where a moment is zero.

        """
        if self.optimizer != "sgd":
            raise ValueError(f"only optimizer=sgd can be unrolled, got {self.optimizer!r}")
        start = start.detach()
        params, velocity = start, torch.zeros_like(start)  # (S, D)
        with torch.enable_grad():
            for step, rate in enumerate(rates.unbind()):
                if not params.requires_grad:
                    params = params.detach().requires_grad_()
                (grads,) = torch.autograd.grad(loss(params, step).sum(), params, create_graph=create_graph)  # (S, D)
                grads = grads + proximal_mu * (params - start)
                if self.clip_norm is not None:
                    norm = grads.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()  # (S, 1)
                    grads = grads * (self.clip_norm / norm).clamp_max(1)
                grads = grads + self.weight_decay * params
                velocity = self.momentum * velocity + grads if self.momentum else grads
                params = params - rate[:, None] * velocity
                if not create_graph:
                    params, velocity = params.detach(), velocity.detach()
        return params - start

    def num_steps(self, sizes: Int64, phase: Phase | None = None) -> Int64:
        """Return the local steps (K,) of clients with n_k samples; none for a client without samples."""
        epochs, steps = self._length(phase)
        if steps is not None:
            return np.where(sizes > 0, steps, 0)
        return epochs * self._steps_an_epoch(sizes)

    def _length(self, phase: Phase | None) -> tuple[int, int | None]:
        if phase is not None and (phase.local_epochs is not None or phase.local_steps is not None):
            return phase.local_epochs or 1, phase.local_steps
        return self.local_epochs, self.local_steps

    def _steps_an_epoch(self, sizes: Int64) -> Int64:
        if self.batch_size is None:
            return np.minimum(sizes, 1)
        return -(-sizes // self.batch_size)


def rates_of(num_steps: Tensor, lr: float | Tensor, like: Tensor) -> Tensor:
    """Return the rate (E, S) of each step of S rows, 0 after a row's last one.

    Args:
        num_steps: (S,) int64 steps of each row, of which E is the largest.
        lr: local rate of all rows, or (S,), one a row.
        like: for dtype and device.

    """
    step = torch.arange(int(num_steps.max()), device=num_steps.device)[:, None]  # (E, 1)
    return (step < num_steps).to(like) * lr  # (E, S)


class Schedule(NamedTuple):
    """Which samples each row of a cohort sees, in which steps.

    Row k's stream is positions[starts[k] : starts[k + 1]], its passes one after another, each in its own order.
    """

    positions: Int64  # (M,) into the data
    starts: Int64  # (K+1,)
    sizes: Int64  # (K,) samples of one pass, n_k
    num_steps: Int64  # (K,)
    batch_size: int | None

    def bounds(self, row: int, step: int) -> tuple[int, int]:
        """Return where the batch of a step begins and ends in the row's stream."""
        n = int(self.sizes[row])
        batch = self.batch_size or n
        epoch, inside = divmod(step, -(-n // batch))
        begin = epoch * n + inside * batch
        return begin, min(begin + batch, (epoch + 1) * n)


def schedule(
    training: LocalTraining,
    partition: Partition,
    clients: Int64,
    *,
    seed: int | Int64,
    round: int | Int64,
    phase: tuple[int, Phase | None] = (0, None),
) -> Schedule:
    """Lay out a cohort's local round: a pure function of (seed, round, client).

    Args:
        training: what clients do.
        partition: the training samples of all clients.
        clients: (K,) ids.
        seed: of the run, or one per row (K,).
        round: the round, or one per row (K,).
        phase: which part of the local round, and its number.

    """
    number, part = phase
    sizes = partition.sizes[clients]  # (K,)
    num_steps = training.num_steps(sizes, part)  # (K,)
    per_epoch = np.maximum(training._steps_an_epoch(sizes), 1)
    epochs = -(-num_steps // per_epoch)  # (K,) passes begun
    segments = np.repeat(np.arange(len(clients)), epochs)  # (S,) row of each pass
    first = np.cumsum(epochs) - epochs
    epoch = np.arange(len(segments)) - first[segments]  # (S,)
    length = sizes[segments]  # (S,)
    row_seed = seed[segments] if isinstance(seed, np.ndarray) else seed
    row_round = round[segments] if isinstance(round, np.ndarray) else round
    keys = keyed_bits(row_seed, "order", row_round, clients[segments], number, epoch)  # (S,)
    order = segment_permutations(keys, length)  # (M,)
    # `order` indexes the concatenation of passes; a pass is its client's slice of the partition.
    shift = partition.offsets[clients][segments] - (np.cumsum(length) - length)  # (S,)
    positions = partition.indices[order + np.repeat(shift, length)]  # (M,)
    starts = np.concatenate([[0], np.cumsum(epochs * sizes)])
    return Schedule(positions, starts, sizes, num_steps, training.batch_size)


def moving(names: Sequence[str], phase: Phase | None) -> tuple[str, ...]:
    """Return the names of the parameters that a phase moves.

    Raises:
        ValueError: the phase's pattern matches no name.

    """
    import re

    if phase is None or phase.params is None:
        return tuple(names)
    chosen = tuple(name for name in names if re.search(phase.params, name))
    if not chosen:
        raise ValueError(f"the phase moves parameters matching {phase.params!r}, but none does; known: {list(names)}")
    return chosen
