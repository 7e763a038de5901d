r"""FedHyper: the server's and the clients' rates follow the inner product of consecutive updates.

Wang et al., ICLR 2024. https://arxiv.org/abs/2310.03156 (CL's client is `clients/fedhyper.py`). With Δᵗ the step
of any inner rule, unscaled, and h = κ ⟨Δᵗ, Δᵗ⁻¹⟩ (0 in the first round):
    G    α ← clip(α + h, α_min, α_max),   w ← w + α Δᵗ          the new α scales the Δᵗ that it was made of
    SL   s ← clip(s + h, s_min, s_max),   w ← w + Δᵗ            clients train at s · lr from the next round on
    CL   w ← w + Δᵗ                                             sends Δᵗ and K, from which clients move their rates
What h stands for is −η times the derivative of the loss in the last rate; `fedsim/hypergradient.py` has the exact one.
The paper clips at γ = 3 (its eq. 16) and γ = 10 (eq. 18); that the intervals are [1/γ, γ] is our reading.

Departs from the paper: SL's rate is relative to lr, as in the released code (h has no unit, a rate of 0.01 has).
Departs from the code (ATP-1010/FedHyper), where `preset="reference"` does not say otherwise: its SL rebuilds the
rates from lr each round, so that they never reach a client, and lets the sum run on beyond the bounds; updates are
averaged unweighted. Its "GM", α Δᵗ + 0.9 (α − 1) Mᵗ⁻¹ with α in [0.8, 5], Mᵗ = Δᵗ + 0.9 Mᵗ⁻¹ and h = ⟨Δᵗ, Mᵗ⁻¹⟩, is not
here; the nearest is G around `FedAvg(server_momentum=0.9)`, with h and α of the velocity.
A round in which nobody answers changes nothing: Δᵗ⁻¹ and K are those of the last one in which somebody did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.strategies.wrapper import Wrapper

NORMALIZE = ("none", "cosine")
PRESETS: dict[str, dict[str, Any]] = {
    "FedHyperG.paper": {"min_rate": 1 / 3, "max_rate": 3.0},
    "FedHyperG.reference": {"min_rate": 0.2, "max_rate": 5.0},
    "FedHyperSL.paper": {"min_rate": 0.1, "max_rate": 10.0, "wind_up": False},
    "FedHyperSL.reference": {"min_rate": 0.1, "max_rate": 10.0, "wind_up": True},
}


def hypergradient(delta: Tensor, previous: Tensor, normalize: str = "none") -> Tensor:
    """Return ⟨Δᵗ, Δᵗ⁻¹⟩ of (D,) and (D,), or with "cosine" their cosine (0 if either is 0); 0-d float64."""
    a, b = delta.double(), previous.to(delta.device).double()
    product = a @ b  # ()
    if normalize == "none":
        return product
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)  # ()
    return torch.where(norms > 0, product / norms, 0.0)


@dataclass(frozen=True, kw_only=True)
class _Remembering(Wrapper):
    """What G and SL share: κ, bounds and the memory of the last step."""

    kappa: float = 1.0
    normalize: str = "none"
    preset: str = "paper"
    min_rate: float | None = None
    max_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        known = [key.partition(".")[2] for key in PRESETS if key.startswith(f"{name}.")]
        if self.preset not in known:
            raise ValueError(f"{name}'s preset is one of {', '.join(known)}, got {self.preset!r}")
        for argument, value in PRESETS[f"{name}.{self.preset}"].items():
            if getattr(self, argument) is None:
                object.__setattr__(self, argument, value)
        if self.normalize not in NORMALIZE:
            raise ValueError(f"{name}'s normalize is one of {', '.join(NORMALIZE)}, got {self.normalize!r}")
        if not 0 <= self.kappa < float("inf"):
            raise ValueError(f"{name} needs a finite kappa >= 0, got {self.kappa}; 0 leaves the rates alone")
        if not 0 < (self.min_rate or 0) <= 1 <= (self.max_rate or 0) < float("inf"):
            raise ValueError(
                f"{name} needs 0 < min_rate <= 1 <= max_rate, got {self.min_rate} and {self.max_rate}; null: the preset"
            )

    def memory(self, layout: Layout) -> State:
        """Return Δ = 0 (D,) and a rate of 1 in float64."""
        return {"previous": torch.zeros(layout.size), "rate": torch.ones((), dtype=torch.float64)}

    def _moved(self, delta: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return (κ times the hypergradient, the unclipped next rate)."""
        h = self.kappa * hypergradient(delta, state["previous"], self.normalize)
        return h, state["rate"].to(h.device) + h


@dataclass(frozen=True, kw_only=True)
class FedHyperG(_Remembering):
    """The global scheduler: a server rate α that starts at 1.

    Args:
        rule: the inner rule, any; its step is Δᵗ.
        kappa: κ ≥ 0; 0 is the inner rule. ⟨Δᵗ, Δᵗ⁻¹⟩ is not free of scale: it falls with the square of lr.
        normalize: "none" as published, or "cosine".
        preset: "paper", or "reference" for the released bounds; sets what is None below.
        min_rate: bound on α in (0, 1]; 1/3, reference 0.2.
        max_rate: bound on α ≥ 1; 3, reference 5.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import cohort_of
    >>> rule, cohort = FedHyperG(), cohort_of([[-1.0]])
    >>> _, state, _ = rule(cohort, rule.init(cohort.layout, 1))
    >>> rule(cohort_of([[-0.5]]), state)[0]  # α = 1 + 0.5
    tensor([-0.7500], dtype=torch.float64)

    """

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return α Δᵗ (D,); α and h are metrics."""
        h, moved = self._moved(delta, state)
        rate = moved.clamp(self.min_rate, self.max_rate)  # ()
        return (
            delta * rate.to(delta.dtype),
            {"previous": delta, "rate": rate},
            {"server_rate": rate, "hypergradient": h},
        )


@dataclass(frozen=True, kw_only=True)
class FedHyperSL(_Remembering):
    """The server-side local scheduler: one factor s on all clients' rates, from 1.

    Args:
        rule: the inner rule, any; its step is Δᵗ and is left as it is.
        kappa: κ ≥ 0; 0 is the inner rule.
        normalize: "none" as published, or "cosine".
        preset: "paper", or "reference" for the released accumulator; sets what is None below.
        min_rate: bound on s in (0, 1]; 0.1.
        max_rate: bound on s ≥ 1; 10.
        wind_up: the sum runs on beyond the bounds and must come all the way back. False; reference: True.

    Raises:
        ValueError: an argument out of its range.

    """

    wind_up: bool | None = None

    def sends(self, state: State) -> dict[str, Any]:
        """Return the factor on the clients' rates."""
        return {"lr_scale": state["rate"].clamp(self.min_rate, self.max_rate)}

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return Δᵗ (D,); the factor that this round's clients had and h are metrics."""
        h, moved = self._moved(delta, state)
        rate = moved if self.wind_up else moved.clamp(self.min_rate, self.max_rate)  # ()
        used = self.sends(state)["lr_scale"]
        return delta, {"previous": delta, "rate": rate}, {"lr_scale": used, "hypergradient": h}


@dataclass(frozen=True, kw_only=True)
class FedHyperCL(Wrapper):
    """The server's side of the client-side local scheduler: it sends the last step and the number of participants.

    Args:
        rule: the inner rule, any; its step is Δᵗ and is left as it is.

    """

    @property
    def uploads(self) -> tuple[str, ...]:
        """What it reads of clients: their factor on lr, and what the inner rule reads."""
        return ("lr_scale", *getattr(self.rule, "uploads", ()))

    def memory(self, layout: Layout) -> State:
        """Return Δ = 0 (D,) and K = 1."""
        return {"previous": torch.zeros(layout.size), "num_participants": 1}

    def sends(self, state: State) -> dict[str, Any]:
        """Return Δᵗ⁻¹ (D,) and K."""
        return {"previous": state["previous"], "num_participants": float(state["num_participants"])}

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return Δᵗ (D,); the clients' mean factor on lr in their last step is a metric.

        Raises:
            ValueError: clients that do not adapt their rates: this would be the inner rule under another name.

        """
        if "lr_scale" not in cohort.extras:
            raise ValueError("FedHyperCL needs clients that adapt their rates; choose client=fedhyper")
        scales = cohort.extras["lr_scale"]  # (K,)
        return (
            delta,
            {"previous": delta, "num_participants": len(cohort)},
            {"lr_scale_mean": scales.double().mean()},
        )
