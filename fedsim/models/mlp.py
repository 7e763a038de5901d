"""Multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from fedsim.models.classifier import Classifier, check_at_least


def mlp(input_shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (200,)) -> Classifier:
    """Return dense layers with ReLU between them.

    "2NN" of McMahan et al. (AISTATS 2017, §3) is `hidden=[200, 200]`.

    Args:
        input_shape: shape of one sample, flattened first.
        num_classes: C ≥ 2.
        hidden: width ≥ 1 of each hidden layer; empty is logistic regression.

    """
    check_at_least(1, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    body: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    width = math.prod(input_shape)
    for i, wider in enumerate(hidden, start=1):
        body |= {f"fc{i}": nn.Linear(width, wider), f"relu{i}": nn.ReLU()}
        width = wider
    return Classifier(body, width, num_classes)
