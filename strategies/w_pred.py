r"""Weight prediction: late clients train from the model that the server expects to have when they answer.

The baseline "W-Pred" of Huang et al. (AAAI 2025; arXiv:2309.13536), which takes each client's staleness as known
beforehand; their code does not have it, so its form is ours, after the look-ahead of DANA, Hakimi et al., 2019
(https://arxiv.org/abs/1907.11612). With the server's steps δ and their running mean v, who will be τ rounds late gets
    v ← β v + (1 − β) δ,   ŵ = w + \sum_{i=1}^{τ} β^i v
instead of w. Departs from DANA, where v is the momentum of the workers' own optimisers: here it is of the server's
steps, whatever rule makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.strategies.preaggregation import PreAggregator


@dataclass(frozen=True, kw_only=True)
class WPred(PreAggregator):
    """A rule whose late clients begin at a prediction; without staleness it is the inner rule.

    Args:
        rule: the inner rule.
        momentum: β in [0, 1); 0 predicts nothing. The prediction is at most β / (1 − β) mean steps away.

    Raises:
        ValueError: `momentum` out of its range.

    """

    momentum: float = 0.9

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"WPred needs momentum in [0, 1), got {self.momentum}; 0 predicts nothing")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the inner rule's memory, and v = 0 (D,)."""
        return {"rule": self.rule.init(layout, num_clients), "velocity": torch.zeros(layout.size)}

    def broadcast(self, state: State) -> dict[str, Any]:
        """Return what the inner rule sends, and v (D,): a prediction is made when it is known who is late."""
        inner = getattr(self.rule, "broadcast", None)
        return {**(inner(state["rule"]) if inner else {}), "velocity": state["velocity"]}

    def sent(self, model: Tensor, broadcast: Mapping[str, Any], staleness: int) -> Tensor:
        """Return ŵ (D,) for a client that was sent a model w (D,) and answers so many rounds ≥ 0 late."""
        beta = self.momentum
        ahead = beta * (1 - beta**staleness) / (1 - beta)  # mean steps
        return model + ahead * broadcast["velocity"].to(model) if ahead else model

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,) and the new v; ‖v‖ is a metric."""
        delta, inner, metrics = self.rule(cohort, state["rule"])
        velocity = self.momentum * state["velocity"].to(delta) + (1 - self.momentum) * delta  # (D,)
        norm = torch.linalg.vector_norm(velocity)
        return delta, {"rule": inner, "velocity": velocity}, {**metrics, "velocity_norm": norm}
