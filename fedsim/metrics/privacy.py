"""What a differentially private run has spent: (ε, δ) of noisy sums over randomly drawn clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from fedsim.errors import UserError

ORDERS = (*range(2, 13), 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256, 512)
"""Rényi orders: whole ones, for which the sampled Gaussian has a finite sum; ε is at most 7 % above that of all."""


@dataclass(frozen=True, kw_only=True)
class RDP:
    """Accounts by Rényi differential privacy, through the package dp-accounting.

    Mironov, Talwar & Zhang, 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism".
    https://arxiv.org/abs/1908.10530 Neighbours are cohorts of clients of which one more or less could be drawn.

    Args:
        delta: δ in (0, 1) of (ε, δ); well below one over the number of clients.

    Raises:
        ValueError: `delta` out of its range.
        UserError: the package is not installed.

    """

    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}; well below one over the number of clients")
        try:
            import dp_accounting  # noqa: F401
        except ImportError as error:
            raise UserError("privacy accounting needs dp-accounting: pip install 'fedsim[privacy]'") from error

    def __call__(self, *, noise_multiplier: float, sampling: float, num_rounds: int) -> float:
        """Return ε after some rounds.

        Args:
            noise_multiplier: z ≥ 0, the noise's standard deviation over the sum's sensitivity; 0: ε is infinite.
            sampling: q in (0, 1], the probability with which each client is drawn, independently of all others.
            num_rounds: T ≥ 1.

        """
        if not noise_multiplier:
            return math.inf
        return _epsilon(noise_multiplier, sampling, num_rounds, self.delta)


@lru_cache
def _epsilon(noise_multiplier: float, sampling: float, num_rounds: int, delta: float) -> float:
    import dp_accounting
    from dp_accounting import rdp

    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling < 1:
        event = dp_accounting.PoissonSampledDpEvent(sampling, event)
    accountant = rdp.RdpAccountant(ORDERS)
    accountant.compose(event, num_rounds)
    return float(accountant.get_epsilon(delta))
