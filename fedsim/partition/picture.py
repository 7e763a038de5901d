"""The picture of a partition: who has how much of which class."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

_MAX_NAMED_CLIENTS = 40  # more are ordered by label instead of by number, and not named
_MAX_COLUMNS = 1000  # more clients are drawn in groups of neighbours: a screen has no more pixels
_MAX_NAMED_CLASSES = 30
_CHARACTER = 0.075  # inches of a letter at 8 points
_BAR_COLOUR = "#4c6a92"

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
    from matplotlib.figure import Figure  # half a second, and most commands draw nothing

    columns = _columns(counts)
    num_columns, num_classes = columns.counts.shape
    width = float(np.clip(0.42 * num_columns + 2.2, 6.4, 13))
    height = float(np.clip(0.32 * num_classes, 1.6, 7.5))
    figure = Figure(figsize=(width, height + 2.4), layout="constrained", dpi=120)
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, height])
    _draw_sizes(top, columns)
    _draw_shares(figure, main, columns, named=columns.named and num_classes <= 20)
    _name_classes(main, num_classes, class_names)
    _name_clients(main, columns, client_names, (width - 2.2) / num_columns)
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path)


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


def _draw_sizes(axes: Axes, columns: _Columns) -> None:
    sizes = columns.counts.sum(axis=1) / columns.clients  # (J,)
    if not columns.named:  # one patch: a thousand bars would take ten times as long as all the rest
        axes.stairs(sizes, np.arange(len(sizes) + 1) - 0.5, fill=True, color=_BAR_COLOUR, linewidth=0)
    else:
        bars = axes.bar(np.arange(len(sizes)), sizes, width=0.8, color=_BAR_COLOUR, linewidth=0)
        axes.margins(y=0.15)
        axes.bar_label(bars, [f"{int(n)}" for n in sizes], fontsize=6.5, padding=1)
    axes.set_ylabel("samples", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.locator_params(axis="y", nbins=3, integer=True)


def _draw_shares(figure: Figure, axes: Axes, columns: _Columns, *, named: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    shares = columns.counts / np.maximum(columns.counts.sum(axis=1), 1)[:, None]  # (J, C)
    # The square root keeps small shares visible: with 100 classes most are below 0.05.
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(shares.max()), 1e-9))
    cells = np.ma.masked_equal(shares, 0.0).T  # (C, J)
    colours = ListedColormap(colormaps["Blues"](np.linspace(0.15, 1.0, 256)))  # the palest blue still isn't white
    image = axes.imshow(cells, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axes.set_facecolor("white")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label("share of client", fontsize=9)
    bar.outline.set_visible(False)
    if not named:
        return
    dark = norm(shares) > 0.55  # (J, C)
    for j, c in np.argwhere(columns.counts):
        colour = "white" if dark[j, c] else "black"
        cell = axes.text(j, c, f"{columns.counts[j, c]}", ha="center", va="center", color=colour, fontsize=6.5)
        cell.set_in_layout(False)  # it lies inside the axes; measuring hundreds of them costs more than drawing them


def _name_classes(axes: Axes, num_classes: int, names: Sequence[str] | None) -> None:
    # Of many classes every second, fifth, tenth, … has a label.
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, num_classes) if s * _MAX_NAMED_CLASSES >= num_classes)
    ticks = range(0, num_classes, step)
    axes.set_yticks(ticks, [str(c) if names is None else names[c] for c in ticks])
    axes.set_ylabel("class", fontsize=9)


def _name_clients(axes: Axes, columns: _Columns, names: Sequence[str] | None, room: float) -> None:
    """Name the clients, upright if a name is wider than its `room` in inches."""
    if not columns.named:
        number = int(columns.clients.sum())
        each = f", {number / len(columns.clients):.3g} a column" if number > len(columns.clients) else ""
        axes.set_xlabel(f"{number} clients, ordered by their most frequent class{each}", fontsize=9)
        axes.set_xticks([])
        return
    names = [str(k) for k in range(len(columns.clients))] if names is None else list(names)
    upright = max(map(len, names)) * _CHARACTER > room
    axes.set_xticks(np.arange(len(names)), names, rotation=90 if upright else 0)
    axes.set_xlabel("client", fontsize=9)
