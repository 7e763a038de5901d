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
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
SAMPLES = 4  # what the number of samples is a multiple of


class Sought(NamedTuple):
    """Updates of S clients to be explained."""

    start: Tensor  # (S, D) the models that they received
    updates: Tensor  # (S, D)
    mask: Tensor  # (S, D) bool, which entries count
    weights: Tensor  # (S, B) 1/b for the b samples that are sought, 0 for padding
    rates: Tensor  # (S, E) of their local steps, see `Mimic.rates`


class Late(NamedTuple):
    """Updates of S clients that came late, and what it takes to estimate what the clients would send now."""

    sought: Sought
    x: Tensor  # (S, B, …) where the search begins
    z: Tensor  # (S, B, C)
    newest: Tensor  # (S, D) the models that they would receive now
    rates: Tensor  # (S, E) that they would train at


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
        self, mimic: Any, start: Tensor, samples: tuple[Tensor, Tensor, Tensor], rates: Tensor, **how: Any
    ) -> Tensor:
        """Return the updates (S, D) of local rounds at some rates (S, E) on samples (x, z, weights)."""
        x, z, weights = samples
        labels = z.softmax(-1) if self.labels == "softmax" else z
        criterion = None if self.labels == "softmax" else binary_cross_entropy
        updates: Tensor = mimic.unroll(start, (x, labels, weights), rates=rates, criterion=criterion, **how)
        return updates

    def estimates(self, mimic: Any, parts: Sequence[Late]) -> list[tuple[Found, Tensor]]:
        """Return samples that explain late updates, and the updates (S, D) of the newest models on them.

        Args:
            mimic: `fedsim.engine.mimic.Mimic`: the clients' local round.
            parts: of which each is solved as if it were alone, to rounding.

        """
        late, counts = _joined(parts), [len(part.x) for part in parts]
        found = self.search(mimic, late.sought, late.x, late.z)
        updates = self._updates(mimic, late.newest, (found.x, found.z, late.sought.weights), late.rates)
        results, low = [], 0
        for part, count in zip(parts, counts, strict=True):
            rows, samples = slice(low, low + count), slice(part.x.shape[1])
            mine = Found(found.x[rows, samples], found.z[rows, samples], found.disparity[rows])
            results.append((mine, updates[rows]))
            low += count
        return results

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
        unit = (x - low) / scale
        best = Found(unit, z, torch.full_like(size, torch.inf))
        moments = [torch.zeros_like(value) for value in (unit, unit, z, z)]
        state = [unit, z, *moments, *best]
        fixed = [*sought._replace(mask=sought.mask.to(x)), size]
        count = len(state)

        def step(given: list[Tensor]) -> list[Tensor]:
            unit, z, m_x, v_x, m_z, v_z, *best = given[:count]
            sought, (size, lr, bias) = Sought(*given[count:-3]), given[-3:]
            with torch.enable_grad():
                unit, z = unit.detach().requires_grad_(), z.detach().requires_grad_()
                samples = (low + scale * unit, z, sought.weights)
                updates = self.local_round(mimic, sought.start, samples, sought.rates)
                disparity = (sought.mask * (updates - sought.updates).abs()).sum(-1) / size  # (S,)
                g_x, g_z = torch.autograd.grad(disparity.sum(), [unit, z])
            unit, z = unit.detach(), z.detach()
            found = _better(Found(*best), unit, z, disparity.detach())
            unit, m_x, v_x = _adam(unit, g_x.sign() if self.sign else g_x, m_x, v_x, lr, bias)
            z, m_z, v_z = _adam(z, g_z, m_z, v_z, lr, bias)
            return [unit.clamp(0, 4), z, m_x, v_x, m_z, v_z, *found]

        key = ("search", self.labels, self.sign, low, scale)
        for k in range(self.iterations):
            lr = self.lr * 0.1 ** sum(k >= d * self.iterations for d in DECAYS)
            numbers = [x.new_tensor(lr / (1 - BETAS[0] ** (k + 1))), x.new_tensor(1 - BETAS[1] ** (k + 1))]
            state = mimic.replay(key, step, [*state, *fixed, *numbers])
        unit, z, best = *state[:2], Found(*state[-3:])
        updates = self._updates(mimic, sought.start, (low + scale * unit, z, sought.weights), sought.rates)
        disparity = (sought.mask * (updates - sought.updates).abs()).sum(-1) / size  # (S,)
        best = _better(best, unit, z, disparity)
        return best._replace(x=low + scale * best.x)

    def _updates(self, mimic: Any, start: Tensor, samples: tuple[Tensor, Tensor, Tensor], rates: Tensor) -> Tensor:
        """Return the updates (S, D) of local rounds that nobody differentiates."""

        def updates(given: list[Tensor]) -> list[Tensor]:
            start, *samples, rates = given
            return [self.local_round(mimic, start, tuple(samples), rates, create_graph=False)]  # type: ignore[arg-type]

        result: Tensor = mimic.replay(("updates", self.labels), updates, [start, *samples, rates])[0]
        return result


def _adam(
    value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lr: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step of Adam and its moments; lr () has the first moment's bias in it, bias () is the second's."""
    first = BETAS[0] * first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient * gradient
    return value - lr * first / ((second / bias).sqrt() + EPSILON), first, second


def _joined(parts: Sequence[Late]) -> Late:
    """Return one part of all rows, with room: few sizes occur, for each is a program of its own.

    Samples are padded by such as weigh nothing, rows by the first one again.
    """
    rows = sum(len(part.x) for part in parts)
    samples = -(-max(part.x.shape[1] for part in parts) // SAMPLES) * SAMPLES
    steps = max(max(part.rates.shape[1], part.sought.rates.shape[1]) for part in parts)

    def stacked(values: Sequence[Tensor], length: int | None = None) -> Tensor:
        wide = [value if length is None else _widened(value, length) for value in values]
        return torch.cat([*wide, wide[0][:1].expand(_room(rows) - rows, *wide[0].shape[1:])])

    start, updates, mask, weights, rates = zip(*(part.sought for part in parts), strict=True)
    return Late(
        Sought(stacked(start), stacked(updates), stacked(mask), stacked(weights, samples), stacked(rates, steps)),
        stacked([part.x for part in parts], samples), stacked([part.z for part in parts], samples),
        stacked([part.newest for part in parts]), stacked([part.rates for part in parts], steps),
    )  # fmt: skip


def _widened(values: Tensor, length: int) -> Tensor:
    """Return values (S, b, …) with zeros up to (S, length, …)."""
    return torch.cat([values, values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])], 1)


def _room(rows: int) -> int:
    """Return the next of at most eight sizes in each doubling.

    >>> [_room(rows) for rows in (1, 7, 9, 13, 20, 37)]
    [1, 7, 10, 14, 20, 40]
    """
    grain = max(1, (1 << (rows - 1).bit_length()) // 8)
    return -(-rows // grain) * grain


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
