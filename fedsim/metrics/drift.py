r"""How far the clients of a cohort move, and how much they agree. Δ_k = w_k − w_received, p_k = n_k / \sum n.

    drift ratio     ‖\sum p_k Δ_k‖² / \sum p_k ‖Δ_k‖²                in [0, 1]; 1: all move alike; 0: they cancel
    dissimilarity   B² = \sum p_k ‖g_k‖² / ‖\sum p_k g_k‖² ≥ 1       Li et al., MLSys 2020 (FedProx), definition 3
    spread          \sum p_k ‖Δ_k − \bar Δ‖² = \sum p_k ‖Δ_k‖² − ‖\bar Δ‖²

FedProx defines B on full local gradients g_k at the model received, for which `dissimilarity` takes rows. On updates
B² is the same if a client's round is one full-batch step (Δ_k = −lr · g_k); otherwise it is a proxy that local drift
raises too. Of the same rows it is 1 / drift ratio, and with uniform p it is K times the gradient diversity of Yin et
al., AISTATS 2018. If nothing moves, all agree: drift ratio 1, B² 1 (the paper's exception), cosines 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Streamed, row_square_norms
from fedsim.layout import Layout
from fedsim.linalg import against, combine
from fedsim.metrics.classification import Figures
from fedsim.threads import one_thread

_SMALLEST = 2.0**-104  # drift ratio (2^-52)²: below it what is left of a mean that cancels is its rounding


def drift_of_rows(cohort: Cohort, previous: Tensor | None = None, *, cosines: bool = True) -> Figures:
    """Measure a cohort that holds its updates.

    Args:
        cohort: p are its weights, normalised.
        previous: (D,) the step of the round before, if there was one.
        cosines: whether to take each update's cosine to the mean, which reads the rows once more.

    Returns:
        What `drift_of_sums` returns and, with `cosines`, `cosine` (K,) of each update to the weighted mean (0 if
        either is zero) and `cosine_mean`, their plain mean.

    """
    rows = cohort.rows  # (K, D)
    mean = combine(_normalised(cohort.weights), rows)  # (D,)
    square_norms = row_square_norms(rows)  # (K,)
    figures = _drift(square_norms, cohort.weights, mean, previous)
    if cosines:
        norms = figures["update_norm"] * figures["mean_norm"]  # (K,)
        cosine = _ratio(against(rows, mean).double(), norms).clamp(-1, 1)  # (K,)
        figures |= {"cosine": cosine, "cosine_mean": cosine.mean()}
    return figures


@one_thread()
def drift_of_sums(streamed: Streamed, previous: Tensor | None = None) -> Figures:
    """Measure a cohort of which the engine kept norms and the mean; p are the rule's coefficients, normalised.

    Args:
        streamed: what was summed.
        previous: (D,) the step of the round before, if there was one.

    Returns:
        `update_norm` (K,) and, 0-d float64 each: `update_norm_mean` and `update_norm_std` (plain, population),
        `mean_norm`, `drift_ratio`, `dissimilarity`, `drift_spread`; with `previous` `cosine_previous`, that of the
        mean update.

    """
    return _drift(streamed.sums.square_norms, streamed.sums.coefficients, streamed.mean, previous)


def dissimilarity(gradients: Tensor, weights: Tensor) -> Tensor:
    """Return B² of full local gradients (K, D) at one model, with weights (K,): 0-d float64 in [1, 2^104]."""
    mean = _normalised(weights).to(gradients.dtype) @ gradients  # (D,)
    return _drift(row_square_norms(gradients), weights, mean, None)["dissimilarity"]


def drift_ratio_by_layer(cohort: Cohort, layout: Layout) -> Figures:
    """Return `drift_ratio_<name>` of each parameter tensor; classifiers drift most (Luo et al., NeurIPS 2021, CCVR)."""
    p = _normalised(cohort.weights).to(cohort.rows.dtype)  # (K,)
    figures = {}
    for name, columns in layout.slices.items():
        rows = cohort.rows[:, columns]  # (K, d)
        figures[f"drift_ratio_{name}"] = _drift(row_square_norms(rows), p, combine(p, rows), None)["drift_ratio"]
    return figures


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of two vectors (D,), 0-d float64 in [−1, 1]; 0 if either is zero."""
    norms = torch.linalg.vector_norm(a).double() * torch.linalg.vector_norm(b).double()
    return _ratio((a @ b).double(), norms).clamp(-1, 1)


def _drift(square_norms: Tensor, weights: Tensor, mean: Tensor, previous: Tensor | None) -> Figures:
    total = _normalised(weights) @ square_norms.double()  # Σ p ‖Δ‖²
    mean_square = (mean @ mean).double()
    norms = square_norms.double().sqrt()  # (K,)
    # Jensen's inequality: at most 1; rounding may say more.
    ratio = torch.where(total > 0, mean_square / total, 1.0).clamp(max=1)
    figures = {
        "update_norm": norms,
        "update_norm_mean": norms.mean(),
        "update_norm_std": norms.std(correction=0),
        "mean_norm": mean_square.sqrt(),
        "drift_ratio": ratio,
        "dissimilarity": ratio.clamp(min=_SMALLEST).reciprocal(),
        "drift_spread": (total - mean_square).clamp(min=0),
    }
    if previous is not None:
        figures["cosine_previous"] = cosine(mean, previous)
    return figures


def _normalised(weights: Tensor) -> Tensor:
    return weights.double() / weights.double().sum()  # (K,)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
