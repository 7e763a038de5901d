"""The picture of a partition: who has how much of which class."""

from __future__ import annotations

from collections.abc import Sequence
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
_BAR_COLOUR = "#4c6a92"


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
    column. The colours ("cividis", Nuñez et al., 2018) read the same to the colour-blind; no sample is white.

    Args:
        counts: (K, C) samples of each client and class.
        path: of the file; its suffix says the format.
        class_names: C of them; numbers if absent.
        client_names: K of them; numbers if absent.
        title: a line above.

    Raises:
        ValueError: counts isn't a matrix with at least one client and class, or a list of names has another length.

    """
    from matplotlib.figure import Figure  # half a second, and most commands draw nothing

    counts = np.asarray(counts, dtype=np.int64)  # (K, C)
    if counts.ndim != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be a matrix (clients, classes), got shape {counts.shape}")
    for name, names, number in (("class", class_names, counts.shape[1]), ("client", client_names, counts.shape[0])):
        if names is not None and len(names) != number:
            raise ValueError(f"{name}_names must have {number} entries, got {len(names)}")
    columns = _columns(counts)
    num_columns, num_classes = columns.counts.shape
    width = float(np.clip(0.42 * num_columns + 2.2, 6.4, 13))
    height = float(np.clip(0.32 * num_classes, 1.2, 7.5))
    figure = Figure(figsize=(width, height + 2.4), layout="constrained", dpi=120)
    top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, height])
    _draw_sizes(top, columns)
    _draw_shares(figure, main, columns, named=columns.named and num_classes <= 20)
    _name_axes(main, columns, class_names, client_names)
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
    # Leading class first, then from its purest holder to its least pure; empty clients last.
    order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1), counts.sum(axis=1) == 0))  # (K,)
    starts = np.unique(np.arange(min(num_clients, _MAX_COLUMNS)) * num_clients // min(num_clients, _MAX_COLUMNS))
    grouped = np.add.reduceat(counts[order], starts)  # (J, C)
    return _Columns(grouped, np.diff(starts, append=num_clients), False)


def _draw_sizes(axes: Axes, columns: _Columns) -> None:
    sizes = columns.counts.sum(axis=1) / columns.clients  # (J,)
    axes.bar(np.arange(len(sizes)), sizes, width=0.8 if columns.named else 1.0, color=_BAR_COLOUR, linewidth=0)
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.locator_params(axis="y", nbins=3, integer=True)


def _draw_shares(figure: Figure, axes: Axes, columns: _Columns, *, named: bool) -> None:
    from matplotlib.colors import PowerNorm

    shares = columns.counts / np.maximum(columns.counts.sum(axis=1), 1)[:, None]  # (J, C)
    # The square root keeps small shares visible: with 100 classes most are below 0.05.
    norm = PowerNorm(0.5, vmin=0.0, vmax=max(float(shares.max()), 1e-9))
    cells = np.ma.masked_equal(shares, 0.0).T  # (C, J)
    image = axes.imshow(cells, aspect="auto", cmap="cividis_r", norm=norm, interpolation="nearest")
    axes.set_facecolor("white")
    bar = figure.colorbar(image, ax=axes, pad=0.01, label="share of the client's samples")
    bar.outline.set_visible(False)
    if not named:
        return
    for j, c in np.argwhere(columns.counts):
        colour = "white" if norm(shares[j, c]) > 0.6 else "black"
        axes.text(j, c, f"{columns.counts[j, c]}", ha="center", va="center", color=colour, fontsize=6.5)


def _name_axes(
    axes: Axes, columns: _Columns, class_names: Sequence[str] | None, client_names: Sequence[str] | None
) -> None:
    num_columns, num_classes = columns.counts.shape
    axes.set_ylabel("class")
    step = -(-num_classes // _MAX_NAMED_CLASSES)
    ticks = np.arange(0, num_classes, step)
    axes.set_yticks(ticks, [class_names[c] if class_names is not None else str(c) for c in ticks], fontsize=8)
    if not columns.named:
        axes.set_xlabel(f"{int(columns.clients.sum())} clients, ordered by their most frequent class")
        axes.set_xticks([])
        return
    names = [str(k) for k in range(num_columns)] if client_names is None else list(client_names)
    long = max(len(name) for name in names) > 3
    axes.set_xticks(np.arange(num_columns), names, fontsize=8, rotation=90 if long else 0)
    axes.set_xlabel("client")
