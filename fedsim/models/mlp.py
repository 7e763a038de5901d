"""Multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.classifier import Classifier, check_at_least


class LoneBatchNorm1d(nn.BatchNorm1d):
    """Batch norm that takes a lone sample by its running statistics: one sample has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised batch (B, F)."""
        if self.training and len(x) == 1:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def mlp(
    input_shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (200,), batch_norm: bool = False
) -> Classifier:
    """Return dense layers with ReLU between them.

    "2NN" of McMahan et al. (AISTATS 2017, §3) is `hidden=[200, 200]`.

    Args:
        input_shape: shape of one sample, flattened first.
        num_classes: C ≥ 2.
        hidden: width ≥ 1 of each hidden layer; empty is logistic regression.
        batch_norm: normalise each hidden layer before its ReLU.

    """
    check_at_least(1, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    body: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    width = math.prod(input_shape)
    for i, wider in enumerate(hidden, start=1):
        norm = {f"norm{i}": LoneBatchNorm1d(wider)} if batch_norm else {}
        body |= {f"fc{i}": nn.Linear(width, wider), **norm, f"relu{i}": nn.ReLU()}
        width = wider
    return Classifier(body, width, num_classes)
