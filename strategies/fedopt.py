r"""FedAdam, FedYogi and FedAdagrad: an adaptive optimiser on the server, fed with the clients' mean update.

Reddi et al., ICLR 2021, Algorithm 2. https://arxiv.org/abs/2003.00295
    m ← β₁ m + (1 − β₁) Δ,   Δ = \sum_k (n_k / n) Δ_k
    v ← v + Δ²                              FedAdagrad
    v ← v − (1 − β₂) Δ² sign(v − Δ²)        FedYogi
    v ← β₂ v + (1 − β₂) Δ²                  FedAdam
    w ← w + η m / (\sqrt{v} + τ)
starting at m = 0 and v = τ², the least start that the paper allows. There is no bias correction, as in the
paper. Flower departs from it twice: it starts at v = 0 and its FedAdam corrects the bias. The mean is weighted
by samples, as in the paper's experiments (its Algorithm 2 is written for equal weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import LinearRule, Metrics, State, Sums
from fedsim.layout import Layout


@dataclass(frozen=True, kw_only=True)
class _FedOpt(LinearRule):
    """What the three share: all but the line of Algorithm 2 that moves v."""

    server_lr: float = 0.1
    beta_1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.server_lr > 0:
            raise ValueError(f"{name} needs server_lr > 0, got {self.server_lr}; 0.1 is a start")
        if not self.tau > 0:
            raise ValueError(f"{name} needs tau > 0, got {self.tau}; 0.001 as in the paper")
        for argument in ("beta_1", "beta_2"):
            if not 0 <= (value := getattr(self, argument, 0.0)) < 1:
                raise ValueError(f"{name} needs 0 <= {argument} < 1, got {value}; 0 forgets everything at once")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return m = 0 and v = τ², (D,) each."""
        # v in float64: τ² is then right to the bit in whatever precision the run has
        square = torch.full((layout.size,), self.tau**2, dtype=torch.float64)  # (D,)
        return {"momentum": torch.zeros(layout.size), "square": square}

    def moved(self, square: Tensor, delta_square: Tensor) -> Tensor:
        """Return the next v (D,)."""
        raise NotImplementedError

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return η m / (√v + τ) (D,)."""
        momentum = self.beta_1 * state["momentum"].to(mean) + (1 - self.beta_1) * mean  # (D,)
        square = self.moved(state["square"].to(mean), mean.square())  # (D,)
        delta = self.server_lr * momentum / (square.sqrt() + self.tau)  # (D,)
        return delta, {"momentum": momentum, "square": square}, {}


@dataclass(frozen=True, kw_only=True)
class FedAdam(_FedOpt):
    """FedAdam.

    Args:
        server_lr: η > 0, about the largest step of one parameter.
        beta_1: β₁ in [0, 1), memory of the mean update.
        beta_2: β₂ in [0, 1), memory of its square.
        tau: τ > 0, adaptivity: large makes the step η/τ times FedAvg's with momentum.

    Raises:
        ValueError: an argument out of its range.

    """

    beta_2: float = 0.99

    def moved(self, square: Tensor, delta_square: Tensor) -> Tensor:
        """Return β₂ v + (1 − β₂) Δ² (D,) from v and Δ² (D,)."""
        return self.beta_2 * square + (1 - self.beta_2) * delta_square


@dataclass(frozen=True, kw_only=True)
class FedYogi(_FedOpt):
    """FedYogi: v moves by at most (1 − β₂) Δ², up or down. Arguments as `FedAdam`."""

    server_lr: float = 0.01
    beta_2: float = 0.99

    def moved(self, square: Tensor, delta_square: Tensor) -> Tensor:
        """Return v − (1 − β₂) Δ² sign(v − Δ²) (D,) from v and Δ² (D,)."""
        return square - (1 - self.beta_2) * delta_square * (square - delta_square).sign()


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(_FedOpt):
    """FedAdagrad: v only grows. The paper takes β₁ = 0. Arguments as `FedAdam`, without `beta_2`."""

    beta_1: float = 0.0

    def moved(self, square: Tensor, delta_square: Tensor) -> Tensor:
        """Return v + Δ² (D,) from v and Δ² (D,)."""
        return square + delta_square
