r"""Norm clipping: bound each update's length, then average.

Sun et al., 2019, "norm thresholding of updates". https://arxiv.org/abs/1911.07963
    g = \sum_k (n_k / n) Δ_k min(1, M / ‖Δ_k‖)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import combine, proportions, row_norms


@dataclass(frozen=True, kw_only=True)
class NormClipping:
    """The mean of updates no longer than a bound, weighted by samples.

    Args:
        max_norm: M > 0, in units of the updates' Euclidean norms.

    Raises:
        ValueError: `max_norm` not above 0.

    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"NormClipping needs max_norm > 0, got {self.max_norm}")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the mean (D,) of the clipped updates; the share of clients clipped is a metric."""
        norms = row_norms(cohort.matrix)  # (K,)
        factor = (self.max_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)  # (K,)
        share = proportions(cohort.weights).to(norms.device)  # (K,)
        return combine(share * factor, cohort.matrix), state, {"clipped_fraction": (factor < 1).double().mean()}
