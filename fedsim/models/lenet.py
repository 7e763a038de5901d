"""LeNet-5."""

from __future__ import annotations

from torch import nn

from fedsim.models.classifier import Classifier, check_image


def lenet(input_shape: tuple[int, ...], num_classes: int) -> Classifier:
    """Return two 5×5 convolutions (6, 16 filters) and two dense layers (120, 84).

    LeCun et al. (Proc. IEEE 1998, fig. 2); 61,706 parameters at 1×28×28 and 10 classes, 62,006 at 3×32×32.
    Departs from the paper as the field does: ReLU, max-pooling, full connections and a linear head. Images
    smaller than the paper's 32×32 are padded by 2 pixels.

    Args:
        input_shape: (channels, height, width), sides ≥ 12.
        num_classes: C ≥ 2.

    """
    channels, height, width = check_image("lenet", input_shape, min_side=12)
    padding = 2 if min(height, width) < 32 else 0
    rows, columns = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    body: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, 6, kernel_size=5, padding=padding),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 16, kernel_size=5),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(16 * rows * columns, 120),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(120, 84),
        "relu4": nn.ReLU(),
    }
    return Classifier(body, 84, num_classes)
