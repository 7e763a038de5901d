r"""Accuracy on samples that an adversary has moved, each within a small box, to where the model errs most.

Madry et al., ICLR 2018: S steps of projected gradient ascent on the cross-entropy from a random start in the box of
radius ε. https://arxiv.org/abs/1706.06083. With S = 1 one step of ε from the sample itself, the fast gradient sign
method (Goodfellow et al., ICLR 2015, eq. in §4). https://arxiv.org/abs/1412.6572
It bounds the accuracy under the worst adversary from above: a model that hides its gradients looks more robust than it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.ascent import ascend, step_of
from fedsim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """Moves samples before they are evaluated.

    Args:
        radius: ε > 0 in units of the features as the model sees them.
        num_steps: S ≥ 1.
        bounds: least and largest value of a feature; None: no bound.
        key: of the random starts, the same in all rounds.

    """

    radius: float
    num_steps: int
    bounds: tuple[float | None, float | None]
    key: int

    def __call__(self, logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, first: int) -> Tensor:
        """Return x (B, …) moved.

        Args:
            logits: from samples (B, …) to (B, C).
            x: (B, …).
            y: (B,) int64 classes.
            first: number of the first sample in its pass, which tells batches apart.

        Raises:
            UserError: the samples are no numbers that could be moved, e.g. tokens.

        """
        if not x.is_floating_point():
            raise UserError(
                f"metrics.robust_radius needs floating-point features, this data has {x.dtype}; set it to 0"
            )
        once = self.num_steps == 1
        key = None if once else torch.tensor(self.key + first, device=x.device)
        step = self.radius if once else step_of(self.radius, self.num_steps)
        return ascend(
            logits, x, y,
            radius=self.radius, step_size=step, num_steps=self.num_steps, bounds=self.bounds, key=key,
        )  # fmt: skip
