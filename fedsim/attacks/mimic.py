r"""Mimic: all attackers copy one honest client, the one that stands out most, so that it counts too much.

Karimireddy, He & Jaggi, ICLR 2022, §3.2 and appendix. https://arxiv.org/abs/2006.09365
    m ← (t m + mean Δ_i) / (t + 1);   u = \sum_i (Δ_i − m)⟨Δ_i − m, z⟩;   z ← t z + u / ‖u‖, normalised
    Δ_k = Δ_{i*},   i* = argmax_i ⟨Δ_i − m, z⟩ over the honest clients of the round
An attack for data that differs by client: no copied row is an outlier. u is normalised as in the authors' code: the
updates' scale does not say how fast z is learned.
Departs from the paper where not all clients take part in every round: i* is chosen anew among those that do, by a z
that goes on being learned, instead of fixed after a first epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attacks.contract import View
from fedsim.contracts import State
from fedsim.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Mimic:
    """Copies of the client farthest along the leading direction of the honest spread."""

    def init(self, layout: Layout) -> State:
        """Return t = 0, m = 0 (D,) and no direction yet."""
        return {"count": 0, "mean": torch.zeros(layout.size), "direction": torch.zeros(layout.size)}

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return the chosen client's update for every attacker, (F, D)."""
        known, count = view.known, int(state["count"])
        mean = (count * state["mean"].to(known) + view.mean) / (count + 1)  # (D,)
        z = state["direction"].to(known)  # (D,)
        if count == 0:
            start = view.cohort.rng("mimic").normal(size=known.shape[1])
            z = _normalised(torch.from_numpy(start).to(known))
        centred = known - mean  # (H, D)
        spread = centred.T @ (centred @ z)  # (D,)
        if bool(spread.any()):  # equal updates have no spread to learn from
            z = _normalised(count * z + _normalised(spread))
        chosen = (centred @ z).argmax()
        return view.all(known[chosen]), {"count": count + 1, "mean": mean, "direction": z}


def _normalised(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    unit: Tensor = x / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return unit
