r"""FedHyper-CL's client: each client's rate follows the inner products of its own consecutive steps.

Wang et al., ICLR 2024, eq. 20. https://arxiv.org/abs/2310.03156 (the server's side is `strategies/fedhyper.py`).
The factor m on lr is 1 in a round's first step. With g_k the gradient of step k, Δ the server's last step and K how
many took part in it:
    additive         m ← clip(m + κ (⟨g_k, g_{k−1}⟩ − (c/K) ⟨g_k, Δ⟩), m_min, m_max),   then the step with m · lr
    multiplicative   m ← clip(m · min(1.1, 1 + κ (⟨d_k, d_{k−1}⟩ + (c/K) ⟨d_k, Δ⟩)), m_min, m_max)
Additive is the paper's form, c = 1, with its rate taken relative to lr. Multiplicative is the released code's
(ATP-1010/FedHyper, `update.py`), c = 0.1, on whole steps d of the optimiser: the step after d_k takes m · lr, d_0 is
passed over, and d_1's predecessor is Δ. The code passes over the first batch of later local epochs too; here not.
That the paper's rate starts anew each round, and that its K counts participants, both as in the code, is our reading.
A cosine in the place of a product (`normalize`) is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedsim.clients.wrapper import Wrapper
from fedsim.contracts import Context
from fedsim.layout import Params
from fedsim.linalg import dot

NORMALIZE = ("none", "cosine")
RECURRENCES = ("additive", "multiplicative")
_LAST, _POSITION, _SCALE = "hyper_last", "hyper_position", "hyper_scale"  # of the step state
FEW = 1 << 12  # entries of a tensor whose product with another costs less than to ask for it
GROWTH = 1.1  # bound of the released code on what one step may multiply m by
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"recurrence": "additive", "global_weight": 1.0},
    "reference": {"recurrence": "multiplicative", "global_weight": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class FedHyper(Wrapper):
    """Any objective, trained at a rate that it adapts step by step. Nothing waits for the device.

    Args:
        objective: what is minimised; cross-entropy.
        kappa: κ ≥ 0; 0 is the objective itself.
        normalize: "none" as published, or "cosine".
        preset: "paper", or "reference" for the released recurrence; sets what is None below.
        min_rate: bound on m in (0, 1].
        max_rate: bound on m ≥ 1.
        recurrence: "additive" or "multiplicative".
        global_weight: c ≥ 0; 0 leaves the server's step out.

    Raises:
        ValueError: an argument out of its range.

    """

    kappa: float = 1.0
    normalize: str = "none"
    preset: str = "paper"
    min_rate: float = 0.1
    max_rate: float = 10.0
    recurrence: str | None = None
    global_weight: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"FedHyper's preset is one of {', '.join(PRESETS)}, got {self.preset!r}")
        for argument, value in PRESETS[self.preset].items():
            if getattr(self, argument) is None:
                object.__setattr__(self, argument, value)
        for argument, known in (("normalize", NORMALIZE), ("recurrence", RECURRENCES)):
            if getattr(self, argument) not in known:
                raise ValueError(f"FedHyper's {argument} is one of {', '.join(known)}, got {getattr(self, argument)!r}")
        for argument in ("kappa", "global_weight"):
            if not 0 <= getattr(self, argument) < float("inf"):
                raise ValueError(f"FedHyper needs a finite {argument} >= 0, got {getattr(self, argument)}")
        if not 0 < self.min_rate <= 1 <= self.max_rate < float("inf"):
            raise ValueError(f"FedHyper needs 0 < min_rate <= 1 <= max_rate, got {self.min_rate} and {self.max_rate}")

    def direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return the objective's own direction, and m for this step, times the objective's own factor on its rate."""
        grads, state = self.inner_direction(grads, params, context)
        names = [name for name in grads if name in context.layout.slices]
        if not names:  # a phase that moves personal parameters alone
            return grads, state
        if self.recurrence == "additive":
            own = self._additive(_parts([grads[name] for name in names]), names, context)
        else:
            own = self._multiplicative(_parts([params[name] for name in names]), names, context)
        if "lr_scale" in state:  # of the objective, such as 0 in a pass that goes nowhere
            return grads, {**state, **own, _SCALE: own["lr_scale"], "lr_scale": own["lr_scale"] * state["lr_scale"]}
        return grads, {**state, **own}

    def finish(self, params: Params, context: Context) -> tuple[Mapping[str, Tensor], dict[str, Tensor], Any]:
        """Return what the objective returns, and upload the m of the last phase's last step as `lr_scale`."""
        state, extras, weight = self.inner_finish(params, context)
        return state, {**extras, "lr_scale": _scale(next(iter(params.values())), context)}, weight

    def _additive(self, grad: list[Tensor], names: list[str], context: Context) -> dict[str, Tensor]:
        scale = _scale(grad[0], context)
        if context.step:
            flat = [part.flatten() for part in grad]  # once for two products
            h = self._product(flat, _recalled(_LAST, grad, context)) - self._to_server(flat, names, context)
            scale = torch.add(scale, h, alpha=self.kappa).clamp(self.min_rate, self.max_rate)
        return {"lr_scale": scale, **_stored(_LAST, grad)}

    def _multiplicative(self, position: list[Tensor], names: list[str], context: Context) -> dict[str, Tensor]:
        scale = _scale(position[0], context)
        step = [torch.zeros_like(part) for part in position]
        if context.step > 1:
            left = _recalled(_POSITION, position, context)
            step = [part - before for part, before in zip(position, left, strict=True)]
            before = _sent(names, context) if context.step == 2 else _recalled(_LAST, step, context)
            h = self._to_server(step, names, context) + (self._product(step, before) if before else 0.0)
            scale = (scale * (1 + self.kappa * h).clamp(max=GROWTH)).clamp(self.min_rate, self.max_rate)
        return {"lr_scale": scale, **_stored(_LAST, step), **_stored(_POSITION, position)}

    def _to_server(self, x: list[Tensor], names: list[str], context: Context) -> Tensor:
        """Return (c/K) ⟨x, Δ⟩."""
        sent = _sent(names, context)
        if not sent or not self.global_weight:
            return x[0].new_zeros(())
        share: Tensor = self._product(x, sent) * (self.global_weight / context.broadcast["num_participants"])
        return share

    def _product(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        product = _dot(a, b)  # ()
        if self.normalize == "none":
            return product
        norms = _dot(a, a).sqrt() * _dot(b, b).sqrt()  # ()
        return torch.where(norms > 0, product / norms, 0.0)


def _parts(values: list[Tensor]) -> list[Tensor]:
    """Return tensors of many entries, and those of few as one vector; all as one would copy the model."""
    few = [value.flatten() for value in values if value.numel() <= FEW]
    many = [value for value in values if value.numel() > FEW]
    return [*many, torch.cat(few)] if len(few) > 1 else [*many, *few]


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return ⟨a, b⟩ () of parts, one by one: one flat vector would be another copy of the model in every step."""
    first, *others = map(dot, a, b)
    return sum(others, first)


def _scale(like: Tensor, context: Context) -> Tensor:
    """Return m () of the last step, 1 before the first."""
    scale: Tensor | None = context.step_state.get(_SCALE, context.step_state.get("lr_scale"))
    return like.new_ones(()) if scale is None else scale


def _stored(name: str, values: list[Tensor]) -> Params:
    return {f"{name}.{k}": value for k, value in enumerate(values)}


def _recalled(name: str, like: list[Tensor], context: Context) -> list[Tensor]:
    return [context.step_state[f"{name}.{k}"] for k in range(len(like))]


def _sent(names: list[str], context: Context) -> list[Tensor]:
    """Return the parts of Δ, flat, that belong to some names; nothing if the server sends none."""
    previous = context.broadcast.get("previous")
    if previous is None:
        return []
    places = [context.layout.slices[name] for name in names]
    many = [previous.narrow(-1, p.start, p.stop - p.start) for p in places if p.stop - p.start > FEW]
    few = [p for p in places if p.stop - p.start <= FEW]
    if few and all(p.stop == q.start for p, q in pairwise(few)):  # neighbours lie in one piece already
        return [*many, previous.narrow(-1, few[0].start, few[-1].stop - few[0].start)]
    return [*many, *_parts([previous.narrow(-1, p.start, p.stop - p.start) for p in few])]
