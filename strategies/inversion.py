r"""Gradient inversion: samples whose local round gives a known update.

Huang et al., "Tackling Intertwined Data and Device Heterogeneities in Federated Learning with Unlimited Staleness"
(AAAI 2025; arXiv:2309.13536), on Geiping et al., NeurIPS 2020 (arXiv:2003.14053):
    \min_{x, z} ‖ M ⊙ (LocalRound(w; x, y(z)) − w − Δ) ‖_1,   y(z) = softmax(z)
by Adam on x and z, with x kept in the range of the data. All clients of a round are inverted as one program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

DECAYS = (3 / 8, 5 / 8, 7 / 8)  # of the iterations, where the rate falls by 10: the authors' `recon.py`


class Sought(NamedTuple):
    """Updates of S clients to be explained."""

    start: Tensor  # (S, D) the models that they received
    updates: Tensor  # (S, D)
    mask: Tensor  # (S, D) bool, which entries count
    weights: Tensor  # (S, B) 1/b for the b samples that are sought, 0 for padding
    num_steps: Tensor  # (S,) local steps
    round: int | Sequence[int]  # whose local rate they had; (S,): each its own


class Found(NamedTuple):
    """Samples that explain them."""

    x: Tensor  # (S, B, …)
    z: Tensor  # (S, B, C) labels before the softmax
    disparity: Tensor  # (S,) ‖M ⊙ (…)‖₁ / ‖M ⊙ Δ‖₁


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How samples are sought.

    Args:
        iterations: steps ≥ 0 of Adam.
        lr: its rate > 0, in units of the inputs' range / 4 for x, as such for z.
        sign: x steps by the sign of its gradient before Adam sees it.
        labels: "softmax", which is the clients' loss; "bce" matches the released code: z as it is, under binary
            cross-entropy.

    Raises:
        ValueError: an argument out of its range.

    """

    iterations: int = 60
    lr: float = 0.3
    sign: bool = False
    labels: str = "softmax"

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be >= 0, got {self.iterations}")
        if not self.lr > 0:
            raise ValueError(f"inversion_lr must be > 0, got {self.lr}")
        if self.labels not in ("softmax", "bce"):
            raise ValueError(f"labels must be softmax or bce, got {self.labels!r}")

    def local_round(
        self, mimic: Any, start: Tensor, samples: tuple[Tensor, Tensor, Tensor], sought: Sought, **how: Any
    ) -> Tensor:
        """Return the updates (S, D) of local rounds on samples (x, z, weights)."""
        x, z, weights = samples
        labels = z.softmax(-1) if self.labels == "softmax" else z
        criterion = None if self.labels == "softmax" else binary_cross_entropy
        updates: Tensor = mimic.unroll(
            start, (x, labels, weights), num_steps=sought.num_steps, criterion=criterion, **how
        )
        return updates

    def search(self, mimic: Any, sought: Sought, x: Tensor, z: Tensor) -> Found:
        """Return the samples of least disparity that a search from x (S, B, …) and z (S, B, C) meets.

        Args:
            mimic: `fedsim.engine.mimic.Mimic`: the clients' local round.
            sought: the updates.
            x: in the range of the data.
            z: labels before the softmax.

        """
        low, high = mimic.bounds
        scale = (high - low) / 4  # the authors' box of −2 … 2 has unit scale
        size = (sought.mask * sought.updates.abs()).sum(-1).clamp_min(torch.finfo(x.dtype).tiny)  # (S,)
        unit, z = ((x - low) / scale).clone().requires_grad_(), z.clone().requires_grad_()
        best = Found(x, z.detach(), torch.full_like(size, torch.inf))
        optimizer = torch.optim.Adam([unit, z], lr=self.lr)
        for iteration in range(self.iterations + 1):
            optimizer.param_groups[0]["lr"] = self.lr * 0.1 ** sum(iteration >= d * self.iterations for d in DECAYS)
            last = iteration == self.iterations
            updates = self.local_round(
                mimic, sought.start, (low + scale * unit, z, sought.weights), sought,
                round=sought.round, create_graph=not last,
            )  # fmt: skip
            disparity = (sought.mask * (updates - sought.updates).abs()).sum(-1) / size  # (S,)
            best = _better(best, low + scale * unit.detach(), z.detach(), disparity.detach())
            if last:
                break
            unit.grad, z.grad = torch.autograd.grad(disparity.sum(), [unit, z])
            if self.sign:
                unit.grad = unit.grad.sign()
            optimizer.step()
            with torch.no_grad():
                unit.clamp_(0, 4)
        return best


def _better(best: Found, x: Tensor, z: Tensor, disparity: Tensor) -> Found:
    """Return the better samples of each row."""
    wins = disparity < best.disparity  # (S,)

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *[1] * (new.dim() - 1)), new, old)

    return Found(choose(x, best.x), choose(z, best.z), choose(disparity, best.disparity))


def binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over samples and classes (S,), targets being any numbers: the released code's loss."""
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)  # (S, B)
    return (weights * losses).sum(-1)  # (S,)


def largest(updates: Tensor, kept: int) -> Tensor:
    """Return the mask (S, D) of the `kept` entries of largest magnitude of each row; ties go to the lower index."""
    order = updates.abs().argsort(dim=-1, descending=True, stable=True)[:, :kept]  # (S, kept)
    return torch.zeros_like(updates, dtype=torch.bool).scatter_(-1, order, True)


def unique(stale: Tensor, fresh: Tensor, quantile: float) -> Tensor:
    """Return which stale updates (S, D) no fresh one (F, D) resembles.

    An update is unique if its least cosine distance to a fresh one exceeds the given quantile of the fresh ones' own
    nearest-neighbour distances. With fewer than two fresh updates all are.
    """
    if len(fresh) < 2:
        return torch.ones(len(stale), dtype=torch.bool, device=stale.device)
    normed: Callable[[Tensor], Tensor] = lambda rows: functional.normalize(rows.double(), dim=-1)  # noqa: E731
    mine, theirs = normed(stale), normed(fresh)  # (S, D), (F, D)
    among = 1 - theirs @ theirs.T  # (F, F)
    among.fill_diagonal_(torch.inf)
    return (1 - mine @ theirs.T).amin(-1) > among.amin(-1).quantile(quantile)  # (S,)
