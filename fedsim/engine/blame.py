"""What a mistake in a user's model or loss is called: the line that it is in, and plain words for torch.func's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fedsim.errors import place_of

_OURS = (  # beginnings of files that are not the user's
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    str(Path(__file__).parent.parent / "build"),  # and what tries a model
    "<string>",
)
# What `torch.func` says, and what that means to whoever wrote the line.
_PLAIN = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"\.item\(\)|data-dependent|is_nonzero", "a tensor's value is asked for, and many clients have many values"),
        (r"random(ness| operation)", "it draws from torch's global generator; draw from context.key (fedsim.rng)"),
        (
            r"inplace arithmetic",
            "a tensor made here, which has no axis of clients, is written into; make it of one that has, "
            "e.g. by torch.zeros_like, or use torch.cat or torch.where",
        ),
        (r"data pointer|doesn't have storage", "it leaves torch (NumPy?), where clients cannot be batched"),
        (r"Batching rule not implemented for (\S+?)\.? ", r"torch cannot batch \1"),
        (r"dynamic shape|produces? dynamic", "the shape of its result depends on values, which differ by client"),
        (r"backward\(\) called inside", "a loss returns its value; backward() is not for it to call"),
        (r"grad can be implicitly created only for scalar outputs", "a client's loss must be one number"),
        (r"Expected f\(\*args\) to return a scalar Tensor, got tensor with (\d+) dims",
         r"a client's loss must be one number, got a tensor with \1 axes"),
    )
)  # fmt: skip
_BATCHING = re.compile(r"vmap|functorch|data pointer of Tensor that doesn't have storage|Batching rule")


def batching(error: BaseException) -> bool:
    """Say whether an error is `torch.func`'s: something in the user's code cannot be batched."""
    return isinstance(error, RuntimeError) and bool(_BATCHING.search(str(error)))


def users_line(error: BaseException) -> str:
    """Return what went wrong and the last line of the user's own code on the way there."""
    place = users_place(error)
    return f"{place}: {_words(error)}" if place else _words(error)


def users_place(error: BaseException) -> str:
    """Return the last line of the user's own code on the way to an error, with its file and number; or nothing."""
    return place_of(error, _OURS)


def _words(error: BaseException) -> str:
    text = str(error)
    for pattern, words in _PLAIN:
        if found := pattern.search(text):
            return found.expand(words)
    first = text.splitlines()[0] if text else ""
    if isinstance(error, RuntimeError | ValueError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
