r"""FedLD: aggregate along the principal directions of the clients' updates.

Zeng et al., MICCAI 2024. https://arxiv.org/abs/2408.12300 (the client's side is `clients/margin.py`).
For each tensor ("layer") with updates X (K, d) and the eigenpairs (s_j, e_j) of X Xᵀ / K, s descending,
    u_j = Xᵀ e_j / ‖Xᵀ e_j‖,   c_j = (1/K) \sum_i sign⟨x_i, u_j⟩ ‖x_i‖
    g = \sum_{j ≤ k} (s_j / \sum_l s_l) c_j u_j,   k = ⌊K · k_proportion⌋
Since ⟨x_i, u_j⟩ = sqrt(K s_j) e_j[i], all of it is a function of the Gram matrix: g = Xᵀ a with a (K,).
The first round, when there is no history yet, takes the mean; where nobody answers in it, no round does.

The released code (Zeng-Shuang/FedLD, `svd_tools.py`) first flips u_j by a majority vote ("calibration"). The
flip cancels in c_j u_j, so nothing is implemented for it. It also sends buffers (BatchNorm's running
statistics) through the rule; here they are no part of the updates. It starts a tensor's history at the first round in
which it moves, here all begin together. Its other oddities are `preset=reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import combine, grams, proportions

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"min_components": 1, "guards": True},
    "reference": {"min_components": 0, "guards": False},
}


@dataclass(frozen=True, kw_only=True)
class FedLD:
    """FedLD's principal-gradient rule in closed form, two reads of the updates.

    Args:
        k_proportion: share of the K principal directions that are kept, in (0, 1].
        per_layer: one spectrum a tensor, as published; False takes one of the whole vector, another algorithm.
        weighted: c_j and the spectrum weigh client i by n_i instead of equally; not in the paper.
        server_lr: factor > 0 on the step.
        preset: "paper", or "reference" for the released code with its bugs; sets what is None below.
        tol: directions with s_j ≤ tol · s_1 are dropped, and entries of e_j below tol have sign 0. In [0, 1);
            None is 1e-6 for float32 updates and 1e-12 for float64.
        min_components: least k. 1; reference: 0, where a single client's update is thrown away.
        guards: a tensor of zeros gives 0, a client orthogonal to u_j counts as sign 0. True; reference: False,
            where both give NaN.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(FedLD(), [[2.0, 1.0], [2.0, -1.0]], weights=[1, 1]).round(6)
    array([1.788854, 0.      ])

    """

    k_proportion: float = 0.8
    per_layer: bool = True
    weighted: bool = False
    server_lr: float = 1.0
    preset: str = "paper"
    tol: float | None = None
    min_components: int | None = None
    guards: bool | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"FedLD's preset is one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not 0 < self.k_proportion <= 1:
            raise ValueError(f"FedLD needs 0 < k_proportion <= 1, got {self.k_proportion}; 0.8 is as published")
        if not self.server_lr > 0:
            raise ValueError(f"FedLD needs server_lr > 0, got {self.server_lr}; 1.0 is as published")
        if self.tol is not None and not 0 <= self.tol < 1:
            raise ValueError(f"FedLD needs 0 <= tol < 1, got {self.tol}; null chooses it by precision")
        if self.min_components not in {0, 1}:
            raise ValueError(f"FedLD needs min_components 0 or 1, got {self.min_components}; 1 keeps lone clients")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory: the round's number says whether it is the first."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,) with its length over the mean's and its cosine to the mean."""
        updates = cohort.rows  # (K, D)
        num_clients = len(cohort)
        weights = cohort.weights if self.weighted else torch.ones_like(cohort.weights)
        share = proportions(weights).to(updates.device)  # (K,)
        kept = max(self.min_components or 0, math.floor(num_clients * self.k_proportion))
        if cohort.round <= 1 or (num_clients == 1 and kept == 1):
            return self.server_lr * combine(share, updates), state, {}
        columns = list(cohort.layout.slices.values()) if self.per_layer else [slice(0, updates.shape[1])]
        inner = grams(updates, columns)  # (L, K, K)
        tol = self.tol if self.tol is not None else (1e-12 if updates.dtype == torch.float64 else 1e-6)
        coefficients = principal_coefficients(inner, share, kept, tol=tol, guards=bool(self.guards))  # (L, K)
        # A lone number has no direction: the released code takes its mean, which is the rule's limit in d = 1.
        single = torch.tensor([part.stop - part.start == 1 for part in columns], device=inner.device)  # (L,)
        coefficients = torch.where(single[:, None], share, coefficients)  # (L, K)
        parts = [combine(a, updates[:, part]) for a, part in zip(coefficients, columns, strict=True)]
        delta = self.server_lr * torch.cat(parts)  # (D,)
        return delta, state, _against_mean(inner, coefficients, share)


def principal_coefficients(inner: Tensor, share: Tensor, kept: int, *, tol: float, guards: bool) -> Tensor:
    """Return a (L, K) such that the rule's step of each layer is Xᵀ a.

    Args:
        inner: (L, K, K) float64 Gram matrices.
        share: (K,) the clients' parts, 1/K each in the paper.
        kept: k, how many directions count.
        tol: relative size of what counts as 0, in eigenvalues and in entries of eigenvectors.
        guards: 0/0 is 0; else NaN.

    """
    scale = (share * len(share)).sqrt()  # (K,) rows are scaled by sqrt(K n_i / n): all ones in the paper
    values, vectors = torch.linalg.eigh(scale[:, None] * inner * scale)  # (L, K), (L, K, K) ascending
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)  # descending; s up to the factor K
    counts = values > tol * values[:, :1]  # (L, K)
    counts[:, kept:] = False
    signs = torch.where(vectors.abs() <= tol, 0.0, vectors.sign())  # (L, K, K) of ⟨x_i, u_j⟩
    norms = inner.diagonal(dim1=-2, dim2=-1).sqrt()  # (L, K)
    c = torch.einsum("k,lk,lkj->lj", share, norms, signs)  # (L, K)
    strength = values / values.sum(-1, keepdim=True) * c * values.rsqrt()  # (L, K) of Xᵀ e_j; NaN where s_j = 0
    along = torch.where(counts, strength, 0.0)  # (L, K)
    if not guards:
        undefined = (counts[:, None, :] & (signs == 0)).any(-2)  # (L, K) a kept direction with an orthogonal client
        along = torch.where(undefined, torch.nan, along)
        along[values[:, 0] == 0] = torch.nan
    return scale * torch.einsum("lkj,lj->lk", vectors, along)  # (L, K)


def _against_mean(inner: Tensor, coefficients: Tensor, share: Tensor) -> Metrics:
    """Compare the step with the mean (over equal or weighted clients) through the Gram matrices alone."""
    product = torch.einsum("lij,lj->li", inner, coefficients)  # (L, K)
    square = (coefficients * product).sum()
    cross = (share * product).sum()
    mean_square = torch.einsum("i,lij,j->", share, inner, share).clamp_min(torch.finfo(torch.float64).tiny)
    length = square.clamp_min(0).sqrt()
    cosine = cross / (length * mean_square.sqrt()).clamp_min(torch.finfo(torch.float64).tiny)
    return {"step_to_mean": length / mean_square.sqrt(), "step_cosine": cosine}
