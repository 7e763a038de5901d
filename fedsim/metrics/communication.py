"""Bytes that a round moves: the arrays' own, without headers, compression on the wire or retries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.contracts import Cohort

_NUMBER = 8  # a Python float or int, in a record as on the wire


def num_bytes(value: Any) -> int:
    """Return the bytes of what is sent: tensors and arrays, numbers (8), strings, and nests of them.

    Raises:
        TypeError: a value that no message could carry.

    """
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, bool | int | float | np.generic):
        return _NUMBER
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping):
        return sum(num_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(num_bytes(item) for item in value)
    raise TypeError(f"cannot count the bytes of a {type(value).__name__}; send tensors, numbers or strings")


def traffic(
    cohort: Cohort,
    broadcast: Mapping[str, Any],
    *,
    num_sent: int,
    num_received: int | None = None,
    buffers: int = 0,
    update: int | None = None,
) -> dict[str, int]:
    """Count a round's bytes, all clients together.

    Args:
        cohort: the replies.
        broadcast: what the rule sent each client with the model.
        num_sent: clients that the model was sent to.
        num_received: clients that replied; None: the cohort's. More if bad updates were dropped.
        buffers: bytes of a model's running statistics, where they travel both ways.
        update: bytes of one encoded update, where a compressor sends less than D numbers; None: D numbers.

    Returns:
        `bytes_down` and `bytes_up`.

    """
    held = cohort.rows if cohort.streamed is None else cohort.streamed.mean
    model = cohort.layout.size * held.itemsize
    replies = len(cohort) if num_received is None else num_received
    # Beside its update a client sends its weight and its second uploads.
    extras = sum(num_bytes(value[:1]) for value in cohort.extras.values())
    if cohort.streamed is not None:
        extras += num_bytes(cohort.streamed.sums.extras)  # means over rows, each of one row's size
    one = (model if update is None else update) + buffers + _NUMBER + extras
    return {
        "bytes_down": num_sent * (model + buffers + num_bytes(broadcast)),
        "bytes_up": replies * one,
    }
