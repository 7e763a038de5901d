"""Residual networks for small images, with group normalisation.

Batch statistics mix clients that differ and leave buffers that do not average: Hsieh et al. (ICML 2020) trace the
loss of accuracy to them and replace them by GroupNorm (Wu and He, ECCV 2018), which treats each sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedsim.models.classifier import Classifier, check_at_least, check_image


class Block(nn.Module):
    """Basic block: relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))). He et al. (CVPR 2016), fig. 2."""

    def __init__(self, inputs: int, outputs: int, stride: int, num_groups: int) -> None:
        """Build a block (B, inputs, H, W) → (B, outputs, H/stride, W/stride)."""
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.norm1 = nn.GroupNorm(num_groups, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs, 3, 1)
        self.norm2 = nn.GroupNorm(num_groups, outputs)
        self.shortcut = nn.Sequential()  # the identity where shapes agree, else the paper's option B
        if stride != 1 or inputs != outputs:
            self.shortcut.append(_conv(inputs, outputs, 1, stride)).append(nn.GroupNorm(num_groups, outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H/stride, W/stride)."""
        h = self.relu1(self.norm1(self.conv1(x)))  # (B, outputs, H/stride, W/stride)
        out: Tensor = self.relu2(self.norm2(self.conv2(h)) + self.shortcut(x))
        return out


class GlobalMean(nn.Module):
    """Mean over the image: `AdaptiveAvgPool2d(1)`, whose backward is not deterministic on CUDA, and flattening."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, F) from (B, F, H, W)."""
        return x.mean((2, 3))  # (B, F)


def resnet8(input_shape: tuple[int, ...], num_classes: int, num_groups: int = 2) -> Classifier:
    """Return the CIFAR ResNet with one block in each of its three stages (16, 32, 64 filters).

    He et al. (CVPR 2016, §4.2) with n = 1; 78,042 parameters at 3×32×32 and 10 classes.

    Args:
        input_shape: (channels, height, width).
        num_classes: C ≥ 2.
        num_groups: of each GroupNorm, a divisor of 16; 1 is layer normalisation over an image.

    """
    return _resnet("resnet8", input_shape, num_classes, widths=(16, 32, 64), depth=1, num_groups=num_groups)


def resnet18(input_shape: tuple[int, ...], num_classes: int, num_groups: int = 2) -> Classifier:
    """Return ResNet-18 with a 3×3 stem and no first pooling, as is usual on 32×32 images.

    He et al. (CVPR 2016, table 1); 11,173,962 parameters at 3×32×32 and 10 classes.

    Args:
        input_shape: (channels, height, width).
        num_classes: C ≥ 2.
        num_groups: of each GroupNorm, a divisor of 64; 1 is layer normalisation over an image.

    """
    return _resnet("resnet18", input_shape, num_classes, widths=(64, 128, 256, 512), depth=2, num_groups=num_groups)


def _resnet(
    name: str, input_shape: tuple[int, ...], num_classes: int, *, widths: Sequence[int], depth: int, num_groups: int
) -> Classifier:
    """Stack a stem, `depth` blocks for each width (the first of every stage but the first halves) and a mean."""
    inputs, _, _ = check_image(name, input_shape, min_side=2 ** (len(widths) - 1))
    check_at_least(1, num_groups=num_groups)
    if widths[0] % num_groups:
        raise ValueError(f"{name} needs num_groups to divide {widths[0]}, got {num_groups}")
    width = widths[0]
    body: dict[str, nn.Module] = {
        "conv": _conv(inputs, width, 3, 1),
        "norm": nn.GroupNorm(num_groups, width),
        "relu": nn.ReLU(),
    }
    for i, wider in enumerate(widths):
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            body[f"block{i * depth + j + 1}"] = Block(width, wider, stride, num_groups)
            width = wider
    return Classifier(body | {"mean": GlobalMean()}, width, num_classes)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """Return a convolution that keeps the image's size at stride 1; the norm that follows has the bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
