"""The form that all built-in models share: a body that gives features and a linear head that gives logits.

Methods with personal heads, prototypes or feature statistics need the two apart (`model.local=head`), and an
engine that batches clients can walk the body's layers one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Number = TypeVar("Number", int, float)


class Classifier(nn.Module):
    """`forward(x) = head(features(x))`, where only axis 0 of x is a batch."""

    def __init__(self, body: Mapping[str, nn.Module], num_features: int, num_classes: int) -> None:
        """Chain the layers of a body and put a linear head on them.

        Args:
            body: name → layer, in the order they are applied; (B, *input_shape) → (B, num_features).
            num_features: F ≥ 1.
            num_classes: C ≥ 2.

        """
        super().__init__()
        check_at_least(2, num_classes=num_classes)
        self.body = nn.Sequential()
        for name, layer in body.items():
            self.body.add_module(name, layer)
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return what the head is applied to, (B, F)."""
        h: Tensor = self.body(x)  # (B, F)
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.head(self.features(x))  # (B, C)
        return logits


def check_at_least(bound: Number, **arguments: Number) -> None:
    """Raise a ValueError that names the first argument below a bound."""
    for name, value in arguments.items():
        if value < bound:
            raise ValueError(f"{name} must be >= {bound}, got {value}")


def check_image(model: str, input_shape: tuple[int, ...], min_side: int) -> tuple[int, int, int]:
    """Return (channels, height, width) of one sample, or raise a ValueError that says what the model reads."""
    if len(input_shape) != 3:
        raise ValueError(
            f"{model} reads images (channels, height, width), got input_shape={tuple(input_shape)}; "
            "choose image data, model=char_gru for text or model=mlp for numbers"
        )
    channels, height, width = input_shape
    if min(height, width) < min_side:
        raise ValueError(f"{model} needs sides >= {min_side} pixels, got {height}x{width}; choose a shallower model")
    return channels, height, width
