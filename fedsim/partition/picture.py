"""The picture of a partition: who has how much of which class."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.partition.canvas import DPI, Box, Canvas, width_of

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

_MAX_NAMED_CLIENTS = 40  # more are ordered by label instead of by number, and not named
_MAX_COLUMNS = 1000  # more clients are drawn in groups of neighbours: a screen has no more pixels
_MAX_NAMED_CLASSES = 30
_CHARACTER = 0.075  # inches of a letter at 8 points
_BAR_COLOUR = "#4c6a92"
# ColorBrewer's sequential "Blues" (Harrower and Brewer, 2003): one hue, even steps of lightness.
_BLUES = ("f7fbff", "deebf7", "c6dbef", "9ecae1", "6baed6", "4292c6", "2171b5", "08519c", "08306b")
_TITLE, _LABEL, _TICK = 11.0, 9.0, 8.0  # points
_CELLS = (9.0, 8.0, 7.0, 6.0)  # of a cell's number, the largest that fits

_drawn: ContextVar[Path | None] = ContextVar("drawn", default=None)


@contextmanager
def drawn_once(folder: Path) -> Iterator[None]:
    """Within it, a picture that stands in a folder already is copied from there: many runs share one partition."""
    token = _drawn.set(folder)
    try:
        yield
    finally:
        _drawn.reset(token)


def draw(
    counts: npt.ArrayLike,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    client_names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw a partition: the clients' sizes above, what share of each client's samples is of which class below.

    Up to 40 clients stand in order, with their names and, where cells are large enough, their counts. More are put in
    order of their most frequent class and its share, so that the structure shows; beyond 1000, neighbours share a
    column. One hue from light to dark reads the same to the colour-blind; no sample at all is white.

    Args:
        counts: (K, C) samples of each client and class.
        path: of the file; its suffix says the format.
        class_names: C of them; numbers if absent.
        client_names: K of them; numbers if absent.
        title: a line above.

    Raises:
        ValueError: counts isn't a matrix with at least one client and class, or a list of names has another length.

    """
    counts = np.asarray(counts, dtype=np.int64)  # (K, C)
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be a matrix (clients, classes), got shape {counts.shape}")
    for name, names, number in (("class", class_names, counts.shape[1]), ("client", client_names, counts.shape[0])):
        if names is not None and len(names) != number:
            raise ValueError(f"{name}_names must have {number} entries, got {len(names)}")
    shared = _drawn.get()
    if shared is None:
        _draw(counts, Path(path), class_names, client_names, title)
        return
    texts = [None if given is None else list(map(str, given)) for given in (class_names, client_names)]
    what = repr((counts.shape, texts, title)).encode() + counts.tobytes()
    known = shared / f"{hashlib.blake2b(what, digest_size=12).hexdigest()}{Path(path).suffix}"
    if not known.exists():
        _draw(counts, Path(path), class_names, client_names, title)
        shared.mkdir(parents=True, exist_ok=True)
        temporary = shared / f".{known.stem}-{os.getpid()}"  # another process may be drawing the same
        shutil.copyfile(path, temporary)
        temporary.replace(known)
        return
    shutil.copyfile(known, path)


def _draw(
    counts: Int, path: Path, class_names: Sequence[str] | None, client_names: Sequence[str] | None, title: str
) -> None:
    columns = _columns(counts)
    num_columns, num_classes = columns.counts.shape
    width = float(np.clip(0.42 * num_columns + 2.2, 6.4, 13))  # inches
    height = float(np.clip(0.32 * num_classes, 1.6, 7.5))
    classes = _every(num_classes, class_names)
    canvas = Canvas(round(width * DPI), round((height + 2.4) * DPI))
    clients = [str(k) for k in range(num_columns)] if client_names is None else list(map(str, client_names))
    clients = clients if columns.named else []
    upright = max(map(len, clients), default=0) * _CHARACTER > (width - 2.2) / num_columns
    tall = max((width_of(name, _TICK) for name in clients), default=0.0) if upright else 16.0 * bool(clients)
    sizes = columns.counts.sum(axis=1) / columns.clients  # (J,)
    steps = _steps(float(sizes.max()) * 1.05, most=3, whole=True)
    left = 34 + max(width_of(text, _TICK) for text in (*classes.values(), *map(str, steps)))
    upper = 14 + 26 * bool(title)
    main: Box = (left, 0, canvas.image.width - 92, canvas.image.height - 34 - tall)
    middle = upper + (main[3] - upper - 12) * 1.1 / (1.1 + height)
    main = (main[0], middle + 12, main[2], main[3])
    _draw_sizes(canvas, (main[0], upper, main[2], middle), columns, sizes, steps)
    _draw_shares(canvas, main, columns, named=columns.named and num_classes <= 20)
    for c, text in classes.items():
        y = main[1] + (c + 0.5) * (main[3] - main[1]) / num_classes
        canvas.line((main[0] - 4, y), (main[0] - 1, y))
        canvas.text(main[0] - 7, y, text, _TICK, "rm")
    canvas.text(16, (main[1] + main[3]) / 2, "class", _LABEL, "mm", upright=True)
    _name_clients(canvas, main, columns, clients, upright=upright)
    if title:
        canvas.text(canvas.image.width / 2, 16, title, _TITLE, "mm")
    canvas.save(path)


class _Columns(NamedTuple):
    counts: Int  # (J, C) samples of each column
    clients: Int  # (J,) clients of each column
    named: bool  # one client a column, in their own order


def _columns(counts: Int) -> _Columns:
    num_clients = len(counts)
    if num_clients <= _MAX_NAMED_CLIENTS:
        return _Columns(counts, np.ones(num_clients, dtype=np.int64), True)
    shares = counts / np.maximum(counts.sum(axis=1), 1)[:, None]  # (K, C)
    # By leading class, then from its purest holder to its least pure, the larger first; empty clients last.
    sizes = counts.sum(axis=1)  # (K,)
    order = np.lexsort((-sizes, -shares.max(axis=1), shares.argmax(axis=1), sizes == 0))  # (K,)
    num_columns = min(num_clients, _MAX_COLUMNS)
    starts = np.arange(num_columns) * num_clients // num_columns  # (J,)
    grouped = np.add.reduceat(counts[order], starts)  # (J, C)
    return _Columns(grouped, np.diff(starts, append=num_clients), False)


def _draw_sizes(canvas: Canvas, box: Box, columns: _Columns, sizes: Float, steps: list[int]) -> None:
    """Draw a bar a column, with its number of samples where clients are named."""
    left, top, right, bottom = box
    scale = (bottom - top) / (max(float(sizes.max()), 1e-9) * (1.15 if columns.named else 1.05))  # pixels a sample
    each = (right - left) / len(sizes)
    if columns.named:
        points = _fitting(sizes, each)
        for j, size in enumerate(sizes.tolist()):
            x, y = left + (j + 0.5) * each, bottom - size * scale
            canvas.fill((x - 0.4 * each, y, x + 0.4 * each, bottom), _BAR_COLOUR)
            canvas.text(x, y - 1, f"{int(size)}", points, "mb")
    else:
        column = ((np.arange(round(right) - round(left)) + 0.5) / each).astype(np.int64).clip(max=len(sizes) - 1)
        for x, size in enumerate(sizes[column].tolist()):
            canvas.fill((left + x, bottom - size * scale, left + x + 1, bottom), _BAR_COLOUR)
    canvas.line((left, top), (left, bottom))
    canvas.line((left, bottom), (right, bottom))
    for step in steps:
        canvas.line((left - 4, bottom - step * scale), (left - 1, bottom - step * scale))
        canvas.text(left - 7, bottom - step * scale, str(step), _TICK, "rm")
    canvas.text(16, (top + bottom) / 2, "samples", _LABEL, "mm", upright=True)


def _draw_shares(canvas: Canvas, box: Box, columns: _Columns, *, named: bool) -> None:
    """Draw what share of each column is of which class, and the scale of the colours."""
    shares = columns.counts / np.maximum(columns.counts.sum(axis=1), 1)[:, None]  # (J, C)
    most = max(float(shares.max()), 1e-9)
    # The square root keeps small shares visible: with 100 classes most are below 0.05.
    depth = np.sqrt(shares / most)  # (J, C) in [0, 1]
    palette = _palette()  # (256, 3)
    pixels = palette[np.rint(depth * 255).astype(np.int64)]  # (J, C, 3)
    pixels[columns.counts == 0] = 255
    canvas.paint(pixels.transpose(1, 0, 2), box)
    left, top, right, bottom = box
    canvas.frame(box)
    bar = (right + 14, top, right + 28, bottom)
    canvas.paint(palette[::-1, None], bar)
    for value in _steps(most, most=5):
        y = bottom - (value / most) ** 0.5 * (bottom - top - 1)
        canvas.line((bar[2], y), (bar[2] + 3, y))
        canvas.text(bar[2] + 6, y, f"{value:g}", _TICK, "lm")
    canvas.text(canvas.image.width - 14, (top + bottom) / 2, "share of client", _LABEL, "mm", upright=True)
    if not named:
        return
    across, along = (right - left) / len(shares), (bottom - top) / shares.shape[1]
    points = _fitting(columns.counts, across)
    for j, c in np.argwhere(columns.counts).tolist():
        colour = "#ffffff" if depth[j, c] > 0.55 else "#000000"
        x, y = left + (j + 0.5) * across, top + (c + 0.5) * along
        canvas.text(x, y, f"{columns.counts[j, c]}", points, "mm", colour=colour)


def _fitting(numbers: npt.NDArray[Any], width: float) -> float:
    """Return the size in points at which the greatest of some whole numbers fits a width in pixels."""
    widest = str(int(numbers.max()))
    return next((points for points in _CELLS if width_of(widest, points) <= 0.9 * width), _CELLS[-1])


def _palette() -> npt.NDArray[np.uint8]:
    """Return 256 colours (256, 3) from pale to dark, the palest of which still isn't white."""
    at = np.linspace(0.15, 1.0, 256) * (len(_BLUES) - 1)  # (256,)
    known = np.array([[int(hue[i : i + 2], 16) for i in (0, 2, 4)] for hue in _BLUES])  # (9, 3)
    return np.stack([np.interp(at, np.arange(len(known)), known[:, i]) for i in range(3)], 1).round().astype(np.uint8)


def _every(count: int, names: Sequence[str] | None) -> dict[int, str]:
    """Return the labels of classes; of many, those of every second, fifth, tenth and so on."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if s * _MAX_NAMED_CLASSES >= count)
    return {c: str(c) if names is None else str(names[c]) for c in range(0, count, step)}


def _steps(high: float, *, most: int, whole: bool = False) -> list[Any]:
    """Return round numbers from 0 to a height, at most so many steps apart."""
    rough = max(high, 1e-9) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1, round(step))
        return list(range(0, int(high) + 1, step))
    return [float(f"{k * step:.6g}") for k in range(int(high / step * (1 + 1e-9)) + 1)]


def _name_clients(canvas: Canvas, box: Box, columns: _Columns, names: Sequence[str], *, upright: bool) -> None:
    """Name the clients, upright if a name is wider than its column."""
    left, _, right, bottom = box
    for j, name in enumerate(names):
        x = left + (j + 0.5) * (right - left) / len(names)
        canvas.line((x, bottom), (x, bottom + 3))
        canvas.text(x, bottom + 6, name, _TICK, "rm" if upright else "mt", upright=upright)
    number = int(columns.clients.sum())
    each = f", {number / len(columns.clients):.3g} a column" if number > len(columns.clients) else ""
    label = "client" if columns.named else f"{number} clients, ordered by their most frequent class{each}"
    canvas.text((left + right) / 2, canvas.image.height - 6, label, _LABEL, "mb")
