r"""FedPer: the last layers of the model stay with each client, and the others are averaged.

Arivazhagan et al., 2019, Algorithms 1 and 2. https://arxiv.org/abs/1912.00818
    w_B ← \sum_k (n_k / n) w_{B,k},   w_{P_k} stays with client k
Clients train base and personal layers together. Every client is evaluated with its own head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsim.contracts import LinearRule


@dataclass(frozen=True)
class FedPer(LinearRule):
    r"""FedAvg of what is not personal.

    Attributes:
        local_parameters: pattern of the parameters that stay with their client where the run's `model.local` says
            nothing: those of the module's attribute `head` (the paper's K_P = 1).

    """

    local_parameters: ClassVar[str] = r"^head\."
