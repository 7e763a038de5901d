r"""Accuracy on samples that an adversary has moved, each within a small box, to where the model errs most.

Madry et al., ICLR 2018: S steps of projected gradient ascent on the cross-entropy from a random start in the box of
radius ε. https://arxiv.org/abs/1706.06083. With S = 1 one step of ε from the sample itself, the fast gradient sign
method (Goodfellow et al., ICLR 2015, §4). https://arxiv.org/abs/1412.6572
It bounds the accuracy under the worst adversary from above: a model that hides its gradients looks better than it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.ascent import Ascent
from fedsim.rng import fold_in


@dataclass(frozen=True)
class Adversary:
    """Moves samples before they are evaluated.

    Args:
        ascent: ε > 0, S ≥ 1 and the bounds; its step size follows from them.
        key: of the random starts, each sample's own and the same in all rounds.

    """

    ascent: Ascent
    key: int

    def __call__(self, logits: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, first: int) -> Tensor:
        """Return x (B, …) moved.

        Args:
            logits: from samples (B, …) to (B, C).
            x: (B, …).
            y: (B,) int64 classes.
            first: number of the first sample in its pass: batches of any size begin at the same places.

        """
        if self.ascent.num_steps == 1:
            return self.ascent._replace(step_size=self.ascent.radius).moved(logits, x, y, None)
        numbers = torch.arange(first, first + len(x), device=x.device)  # (B,)
        return self.ascent.moved(logits, x, y, fold_in(torch.tensor(self.key, device=x.device), numbers))
