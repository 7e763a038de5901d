r"""Ditto: beside the global model each client keeps a second one of its own, held near the global one.

Li et al., ICML 2021, Algorithm 1. https://arxiv.org/abs/2012.04221 (the objective is `clients/ditto.py`).
    w ← \sum_k (n_k / n) w_k as FedAvg,   v_k ← v_k − lr (∇L_k(v_k) + λ (v_k − w_received))
Both move in the same steps, on the same batches; clients are evaluated with v_k. v_k starts at the initial model; a
client that never trained, such as a held-out one, has none, is evaluated with w, and adapts from it with the same λ.
Running statistics of both models are treated alike, as the run's `buffers` says. Departs from the paper: there clients
are drawn by their samples and averaged plainly, here as in FedAvg.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedsim.contracts import LinearRule


class Twin(nn.Module):
    """A model and a personal copy of it: the parameters "shared.…" travel, "personal.…" stay.

    Args:
        model: any module.

    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared = model
        self.personal = copy.deepcopy(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the personal model's logits (B, C); in training both models', (2, B, C), the shared one first."""
        personal: Tensor = self.personal(x)  # (B, C)
        return torch.stack([self.shared(x), personal]) if self.training else personal


@dataclass(frozen=True)
class Ditto(LinearRule):
    r"""FedAvg of the shared models, for `client=ditto`.

    Attributes:
        local_parameters: pattern of the parameters that stay with their client.

    """

    local_parameters: ClassVar[str] = r"^personal\."
    half_of = "strategy=ditto client=ditto"

    def adapt_model(self, model: nn.Module) -> nn.Module:
        """Return the model with its personal twin; in a saved model the global one's names begin with "shared."."""
        return Twin(model)
