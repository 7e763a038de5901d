r"""Where the loss of the new global model comes from: FedLD's decomposition.

Zeng et al., MICCAI 2024 (FedLD), names the three terms; their exact form is this project's. F is the loss over all
clients' training data, F_k over client k's own, w_k its trained model, w the aggregate, p_k = n_k / \sum n over the
cohort:

    F(w)  =  \sum p_k F_k(w_k)                        local: what training left on the clients' own data
          +  \sum p_k (F(w_k) − F_k(w_k))             shift: what their models lose away from home
          +  F(w) − \sum p_k F(w_k)                   aggregation: what merging them loses (negative: gains)

It telescopes, so it holds for any estimates of the F(·) and F_k(·); with one `subsample` for all F(·) their sampling
noise is shared by the terms and largely cancels in `aggregation`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fedsim.metrics.classification import Figures
from fedsim.rng import generator

Positions = np.ndarray[Any, np.dtype[np.int64]]


def decompose(local_losses: Tensor, global_losses: Tensor, aggregate_loss: Tensor, weights: Tensor) -> Figures:
    """Split the aggregate's loss into local, shift and aggregation terms.

    Args:
        local_losses: (K,) F_k(w_k), mean loss of each trained model on its client's training data.
        global_losses: (K,) F(w_k), mean loss of each trained model on all clients' training data.
        aggregate_loss: 0-d F(w), mean loss of the new global model on the same data as `global_losses`.
        weights: (K,) n_k ≥ 0 with a positive sum; rows of weight 0 take no part, whatever their losses.

    Returns:
        0-d float64 each: `decomposition_total` = F(w), which `decomposition_local`, `decomposition_shift` and
        `decomposition_aggregation` sum to.

    Raises:
        ValueError: the shapes differ.

    """
    if not local_losses.shape == global_losses.shape == weights.shape or weights.dim() != 1:
        raise ValueError(
            "local_losses, global_losses and weights must have one entry a client of the cohort, got shapes "
            f"{tuple(local_losses.shape)}, {tuple(global_losses.shape)}, {tuple(weights.shape)}"
        )
    p = weights.double() / weights.double().sum()  # (K,)
    local = (p * local_losses.double()).where(p > 0, 0.0).sum()
    away = (p * global_losses.double()).where(p > 0, 0.0).sum()
    total = aggregate_loss.double()
    terms = {"total": total, "local": local, "shift": away - local, "aggregation": total - away}
    return {f"decomposition_{name}": value for name, value in terms.items()}


def subsample(positions: Positions, limit: int, seed: int) -> Positions:
    """Draw the samples that stand for all clients' training data, without replacement: the same in every round.

    Args:
        positions: (N,) of all clients' training samples.
        limit: most that are kept, ≥ 1; all are if N ≤ limit.
        seed: of the run.

    Returns:
        (min(N, limit),) positions, in their given order.

    """
    if limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    if len(positions) <= limit:
        return positions
    kept = generator(seed, "decomposition").choice(len(positions), limit, replace=False)  # (limit,)
    return positions[np.sort(kept)]
