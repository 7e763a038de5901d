"""The directions along which min-max and min-sum push the honest mean."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedsim.attacks.contract import View

Perturbation = Literal["std", "sign", "unit"]
PERTURBATIONS = ("std", "sign", "unit")


def check_perturbation(name: str) -> None:
    """Refuse a direction that there is not.

    Raises:
        ValueError: it is not one of the three.

    """
    if name not in PERTURBATIONS:
        raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {name!r}")


def direction(view: View, perturbation: Perturbation) -> Tensor:
    """Return p (D,): −σ ("std"), −sign(μ) ("sign") or −μ / ‖μ‖ ("unit") of the known updates."""
    if perturbation == "std":
        return -view.std
    if perturbation == "sign":
        return -view.mean.sign()
    norm: Tensor = torch.linalg.vector_norm(view.mean)
    unit: Tensor = view.mean / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return -unit
