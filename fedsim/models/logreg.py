"""Multinomial logistic regression."""

from __future__ import annotations

import math

from torch import nn

from fedsim.models.classifier import Classifier


def logreg(input_shape: tuple[int, ...], num_classes: int) -> Classifier:
    """Return logits W·flatten(x) + b; C·(F + 1) parameters, F = product of `input_shape`.

    The convex model of the field's overhead benchmarks (784 → 10 on MNIST).
    """
    return Classifier({"flatten": nn.Flatten()}, math.prod(input_shape), num_classes)
