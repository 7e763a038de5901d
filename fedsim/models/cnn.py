"""The two-convolution network of the field's headline simulator benchmark (pfl-cifar10-iid)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedsim.models.classifier import Classifier, check_at_least, check_image
from fedsim.models.dropout import KeyedDropout


def cnn(
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
    dropout: Sequence[float] = (0.0, 0.0),
) -> Classifier:
    """Return conv 3×3 – conv 3×3 – max-pool 2 – dense, without padding, ReLU after each.

    Reddi et al. (ICLR 2021), there for EMNIST; 1,626,442 parameters at 3×32×32 and 10 classes,
    1,206,590 at 1×28×28 and 62.

    Args:
        input_shape: (channels, height, width), sides ≥ 6.
        num_classes: C ≥ 2.
        channels: filters of the two convolutions.
        hidden: width of the dense layer.
        dropout: rates in [0, 1) after the pooling and after the dense layer; the paper's are [0.25, 0.5].

    """
    inputs, height, width = check_image("cnn", input_shape, min_side=6)
    if len(channels) != 2 or len(dropout) != 2:
        raise ValueError(f"cnn takes two channels and two dropout rates, got {list(channels)} and {list(dropout)}")
    first, second = channels
    check_at_least(1, **{"channels[0]": first, "channels[1]": second, "hidden": hidden})
    body: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(inputs, first, kernel_size=3),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(first, second, kernel_size=3),
        "relu2": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "dropout1": KeyedDropout(dropout[0]),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(second * ((height - 4) // 2) * ((width - 4) // 2), hidden),
        "relu3": nn.ReLU(),
        "dropout2": KeyedDropout(dropout[1]),
    }
    # A rate of 0 leaves no layer behind, so that engines see only what computes.
    active = {n: m for n, m in body.items() if not (isinstance(m, KeyedDropout) and m.p == 0)}
    return Classifier(active, hidden, num_classes)
