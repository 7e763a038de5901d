"""What rules share that look at how old a reply is."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.contracts import Cohort

DISCOUNTS = ("constant", "hinge", "polynomial")


def discount(kind: str, staleness: Tensor, a: float, b: float) -> Tensor:
    """Return s(τ) (K,) in float64 of staleness τ (K,). Xie et al., 2019 (FedAsync).

    Args:
        kind: "constant" 1; "hinge" 1 for τ ≤ b, else 1 / (a (τ − b) + 1); "polynomial" (τ + 1)^(−a).
        staleness: (K,) rounds ≥ 0.
        a: > 0.
        b: ≥ 0 rounds, of the hinge.

    """
    age = staleness.double()  # (K,)
    if kind == "constant":
        return torch.ones_like(age)
    if kind == "hinge":
        return 1 / (a * (age - b).clamp_min(0) + 1)
    return (age + 1) ** -a


def check_discount(kind: str, a: float, b: float) -> None:
    """Refuse a discount that there is not, and numbers out of their range."""
    if kind not in DISCOUNTS:
        raise ValueError(f"discount must be one of {', '.join(DISCOUNTS)}, got {kind!r}")
    if not a > 0:
        raise ValueError(f"a must be > 0, got {a}; discount=constant does not look at staleness")
    if not b >= 0:
        raise ValueError(f"b must be >= 0 rounds, got {b}")


def since_received(cohort: Cohort, block: Tensor, columns: slice) -> Tensor:
    """Return w − w_received: how far the model has moved since each client received it.

    Args:
        cohort: with the versions received.
        block: (K, d) of its updates, for dtype and device.
        columns: which.

    Returns:
        (K, d).

    Raises:
        ValueError: a version that a client received is not there.

    """
    since = torch.zeros_like(block)  # (K, d)
    stale = torch.nonzero(cohort.staleness > 0).flatten().tolist()
    if not stale:
        return since
    newest = version(cohort, cohort.round - 1, block)  # (D,)
    for row in stale:
        since[row] = newest[columns] - version(cohort, int(cohort.received[row]), block)[columns]
    return since


def moved(cohort: Cohort, coefficients: Tensor, like: Tensor) -> Tensor | None:
    """Return Σ_k c_k (w − w_received,k) (D,): one subtraction a version; None where nobody is stale.

    Args:
        cohort: with the versions received.
        coefficients: (K,) c_k.
        like: for dtype and device.

    Raises:
        ValueError: a version that a client received is not there.

    """
    share: dict[int, float] = {}  # of each older version
    for received, age, c in zip(
        cohort.received.tolist(), cohort.staleness.tolist(), coefficients.tolist(), strict=True
    ):
        if age > 0:
            share[received] = share.get(received, 0.0) + c
    if not share:
        return None
    total = sum(share.values()) * version(cohort, cohort.round - 1, like)  # (D,)
    for number, c in share.items():
        total.sub_(version(cohort, number, like), alpha=c)
    return total


def version(cohort: Cohort, number: int, like: Tensor) -> Tensor:
    """Return the model (D,) of a version, in a tensor's dtype and on its device."""
    if number not in cohort.models:
        raise ValueError(f"version {number} of the model is not in the cohort; it has {sorted(cohort.models)}")
    return cohort.models[number].to(like)
