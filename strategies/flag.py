r"""Flag Aggregator: project the updates on the subspace that reconstructs most of them best.

Almasi et al., ICLR 2024. https://arxiv.org/abs/2302.05865
With ḡ_k = Δ_k / ‖Δ_k‖ and v_k = ‖Yᵀ ḡ_k‖², the share of update k that the subspace Y (D, r) reconstructs,
    min_{YᵀY = I}  \sum_k \sqrt{1 − v_k}  +  λ/(K(K−1)) \sum_{i≠j} \sqrt{1 − v_{ij}}
by iteratively re-weighted least squares: Y spans the r first directions of the ḡ_k scaled by (1 − v_k)^{−1/4} and of
their differences scaled likewise. v_k are metrics: what to look at to find the bad client. They are blind to signs.
All of it runs on the K×K Gram matrix, the pairs through their graph Laplacian; the updates are read twice.
Clients count alike, whatever their samples; ḡ_k of an update that is 0 is 0.

Departs from the released code (hamidralmasi/FlagAggregator), which `preset=reference` follows:
    combine: the code sums Y Yᵀ ḡ_k and divides by r ("reference"), a step of no client's length; the paper as quoted
        averages Y Yᵀ Δ_k ("raw"), which one long update carries away; "clipped" averages Y Yᵀ of updates cut to the
        median norm: it gives back the mean of equal updates, and no client weighs more than a median one.
    λ: the code squares it and does not normalise differences.
    start: the code starts at a random Y, drawn on the CPU with seed 1; here at equal weights, which is no draw.
Not reproduced: the code hands back the previous subspace if a step did not lower its objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import against, beside, combine, gram

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"combine": "clipped", "start": "equal", "released_pairs": False},
    "reference": {"combine": "reference", "start": "random", "released_pairs": True},
}
COMBINES = ("clipped", "reference", "raw")
STARTS = ("equal", "random")
EPS = 1e-7  # as released: keeps a perfectly reconstructed update from weighing infinitely


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The Flag Aggregator.

    Args:
        preset: "paper", or "reference" for the released code; sets what is None below.
        rank: r ≥ 1 directions, cut to the rank of the updates; None is ⌊(K + 1)/2⌋ as published.
        regularization: λ ≥ 0 on the pairs.
        irls_steps: re-weighted least-squares steps ≥ 1; 1 as released.
        combine: "clipped", "reference" or "raw", see above.
        start: "equal" weights or the released "random" subspace.
        released_pairs: λ squared and differences not normalised, as released.

    Raises:
        ValueError: an argument out of its range.

    """

    preset: str = "paper"
    rank: int | None = None
    regularization: float = 0.0
    irls_steps: int = 1
    combine: str | None = None
    start: str | None = None
    released_pairs: bool | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"Flag's preset is one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, options in (("combine", COMBINES), ("start", STARTS)):
            if getattr(self, name) not in options:
                raise ValueError(f"Flag's {name} is one of {', '.join(options)}, got {getattr(self, name)!r}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"Flag needs rank >= 1, got {self.rank}; null is (K + 1) // 2")
        if not 0 <= self.regularization < float("inf"):
            raise ValueError(f"Flag needs a finite regularization >= 0, got {self.regularization}; 0 is without pairs")
        if self.irls_steps < 1:
            raise ValueError(f"Flag needs irls_steps >= 1, got {self.irls_steps}; 1 is as released")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,); the clients' quality scores v_k are a metric."""
        updates = cohort.rows
        inner = gram(updates)  # (K, K)
        norms = inner.diagonal().sqrt()  # (K,)
        unit = torch.where(norms > 0, 1 / norms, 0.0)  # (K,)
        cosines = unit[:, None] * inner * unit  # (K, K)
        rank = self.rank or (len(cohort) + 1) // 2
        basis, inverse = _embed(cosines)  # (q, K), (K, q)
        if not len(basis):
            return beside(updates).new_zeros(updates.shape[1]), state, {"quality": torch.zeros_like(norms)}
        projected = self._first_projections(updates, unit, rank)  # (r, K) Yᵀ ḡ of the subspace that weighs first
        for _ in range(self.irls_steps):
            scatter = self._weights(projected, cosines)  # (K, K)
            directions = torch.linalg.eigh(basis @ scatter @ basis.T).eigenvectors[:, -rank:]  # (q, r)
            projected = directions.T @ basis  # (r, K)
        quality = projected.square().sum(0)  # (K,)
        share = inverse @ directions @ (projected @ self._lengths(norms, rank))  # (K,) of ḡ_k
        return combine(share * unit, updates), state, {"quality": quality}

    def _lengths(self, norms: Tensor, rank: int) -> Tensor:
        """Return what multiplies each projected unit update, (K,)."""
        if self.combine == "reference":
            return torch.full_like(norms, 1 / rank)
        if self.combine == "raw":
            return norms / len(norms)
        return norms.clamp_max(norms.quantile(0.5)) / len(norms)

    def _weights(self, projected: Tensor, cosines: Tensor) -> Tensor:
        """Return T (K, K) such that one step's scatter matrix is Σ T_ij ḡ_i ḡ_jᵀ."""
        count = len(cosines)
        quality = projected.square().sum(0)  # (K,)
        weights = ((1 - quality).abs() + EPS).rsqrt().diag()  # (K, K)
        if not self.regularization or count < 2:
            return weights
        explained = quality[:, None] + quality - 2 * projected.T @ projected  # (K, K) ‖Yᵀ(ḡ_i − ḡ_j)‖²
        strength = self.regularization / (count * (count - 1))
        if self.released_pairs:
            pairs = strength**2 * ((1 - explained).abs() + EPS).rsqrt()  # (K, K)
        else:
            square = cosines.diagonal()  # (K,) ‖ḡ_i‖²: 1, or 0 of an update that is 0
            length = square[:, None] + square - 2 * cosines  # (K, K) ‖ḡ_i − ḡ_j‖²
            inverse = torch.where(length > 1e-12, 1 / length, 0.0)  # equal updates differ in no direction
            pairs = strength * ((1 - explained * inverse).abs() + EPS).rsqrt() * inverse
        pairs = pairs - pairs.diagonal().diag()
        laplacian = pairs.sum(1).diag() - pairs  # (K, K)
        return weights + 2 * laplacian  # every pair counts in both orders

    def _first_projections(self, updates: Tensor, unit: Tensor, rank: int) -> Tensor:
        """Return Y₀ᵀ ḡ (r, K) of the released random start, or zeros, which weigh all alike."""
        if self.start == "equal":
            return torch.zeros_like(unit[None])
        rng = torch.Generator().manual_seed(1)
        drawn = torch.rand(updates.shape[1], rank, generator=rng, dtype=torch.float32) - 0.5  # (D, r)
        start = torch.linalg.qr(drawn).Q.to(updates)  # (D, min(D, r))
        return against(updates, start).T.double() * unit  # (r, K)


def _embed(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Return R (q, K) with RᵀR = cosines and R⁺ (K, q), over the q eigenvalues that are not rounding noise."""
    values, vectors = torch.linalg.eigh(cosines)
    kept = values > 1e-10 * values[-1].clamp_min(0)  # (K,)
    values, vectors = values[kept], vectors[:, kept]  # (q,), (K, q)
    return values.sqrt()[:, None] * vectors.T, vectors * values.rsqrt()
