r"""Next-character prediction on a text; the speakers of a play are the natural clients.

The task of McMahan et al., AISTATS 2017, sec. 3, and LEAF (Caldas et al., 2018): 80 characters in, the next
one out, a client a role. https://arxiv.org/abs/1602.05629
Departs from LEAF: the test text of a role comes after its training text and shares no character with it
(LEAF's windows overlap at the cut); a window starts every `stride` characters, not at each; roles of one
name in several plays are one client; the classes are the text's own characters.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch

from fedsim.contracts import Dataset
from fedsim.data.files import find_file
from fedsim.data.holdout import check_fraction
from fedsim.errors import UserError

Int64 = npt.NDArray[np.int64]

_SPEECH = re.compile(r"^([^\n:]+):\n(.*?)(?=\n\s*\n[^\n:]+:\n|\Z)", re.MULTILINE | re.DOTALL)


def text(  # noqa: PLR0913  one argument a key of the config
    *,
    path: str | None = None,
    root: str | None = None,
    speakers: bool = True,
    window: int = 80,
    stride: int = 10,
    min_samples: int = 20,
    test_fraction: float = 0.2,
) -> Dataset:
    """Cut a text into windows of characters.

    Args:
        path: the file, UTF-8; see `fedsim.data.files.find_file` for where it is looked for.
        root: folder of data sets; null: FEDSIM_DATA, else `data`.
        speakers: the text is a play, "NAME:" on a line before each speech and an empty line after it; a client
            is a speaker and has all of its speeches. False: one text without clients.
        window: T, characters in; ≥ 1.
        stride: characters between the starts of two windows; ≥ 1. 1 uses every character as a target.
        min_samples: speakers with fewer training windows are left out; ≥ 1.
        test_fraction: the last part of each speaker's text; 0 < test_fraction < 1.

    Returns:
        x (N, T) int64 characters, y (N,) the next character, client (N,) speakers by name. A class is a
        character of the text used, by code point; `class_names` are the characters.

    Raises:
        UserError: no such file, not text, or nothing left to train on.
        ValueError: an argument is out of its range.

    """
    check_fraction("test_fraction", test_fraction)
    for name, value in (("window", window), ("stride", stride), ("min_samples", min_samples)):
        if value < 1:
            raise ValueError(f"{name} must be ≥ 1, got {value}")
    file = find_file(path, root)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {file} is not UTF-8 text: {error}") from error
    streams = _speeches(content) if speakers else {"": content}
    if not streams:
        raise UserError(
            f"data.path: {file} has no line 'NAME:' before a speech; for plain text set data.speakers=false"
        )

    names = sorted(streams)
    lengths = np.array([len(streams[name]) for name in names])  # (S,)
    test_lengths = np.floor(test_fraction * lengths + 0.5).astype(np.int64)  # (S,)
    kept = _num_windows(lengths - test_lengths, window, stride) >= min_samples  # (S,)
    names = [name for name, keep in zip(names, kept, strict=True) if keep]
    lengths, test_lengths = lengths[kept], test_lengths[kept]
    codes = np.frombuffer("".join(streams[name] for name in names).encode("utf-32-le"), dtype=np.uint32)
    vocabulary, characters = np.unique(codes, return_inverse=True)  # (C,), (L,)
    begin = np.cumsum(lengths) - lengths  # (S,)
    cut = begin + lengths - test_lengths  # (S,)
    train, train_client = _windows(begin, lengths - test_lengths, window, stride)
    test, test_client = _windows(cut, test_lengths, window, stride)
    if not len(train) or not len(test):
        raise UserError(
            f"data.path: {file} leaves {len(train)} training and {len(test)} test windows; it needs longer texts, "
            f"or lower data.window={window} and data.min_samples={min_samples}"
        )
    starts = np.concatenate([train, test])  # (N,)
    x = characters.astype(np.int64)[starts[:, None] + np.arange(window)]  # (N, T)
    positions = np.arange(len(starts), dtype=np.int64)
    return Dataset(
        x=torch.from_numpy(x),
        y=torch.from_numpy(characters[starts + window].astype(np.int64)),
        splits={"train": positions[: len(train)], "test": positions[len(train) :]},
        num_classes=len(vocabulary),
        client=np.concatenate([train_client, test_client]) if speakers else None,
        class_names=tuple(chr(code) for code in vocabulary),
        client_names=tuple(names) if speakers else None,
    )


def _speeches(content: str) -> dict[str, str]:
    """Return speaker → all speeches, in order, each ending with a newline."""
    streams: dict[str, list[str]] = {}
    for speech in _SPEECH.finditer(content.replace("\r\n", "\n")):
        streams.setdefault(speech[1].strip(), []).append(speech[2].strip("\n") + "\n")
    return {name: "".join(speeches) for name, speeches in streams.items()}


def _num_windows(lengths: Int64, window: int, stride: int) -> Int64:
    """Count the windows (S,) that have a next character inside texts of the given lengths."""
    return np.maximum((lengths - window - 1) // stride + 1, 0)


def _windows(begin: Int64, lengths: Int64, window: int, stride: int) -> tuple[Int64, Int64]:
    """Return the start of each window (n,) and the text it is from (n,)."""
    counts = _num_windows(lengths, window, stride)  # (S,)
    owner = np.repeat(np.arange(len(counts), dtype=np.int64), counts)  # (n,)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # (n,)
    return begin[owner] + stride * nth, owner
