"""Line charts and heat-maps as inline SVG: colours come from the page's style, so that they fit light and dark."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

NUM_STYLES = 8  # colours and dashes that can be told apart; further lines are thin and grey
_MAX_POINTS = 250  # of a line: a panel is 400 pixels wide
_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 38

# viridis (van der Walt and Smith 2015): even in lightness, so it reads alike to the colour-blind and in print
_VIRIDIS = np.array(
    [(68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
     (110, 206, 88), (181, 222, 43), (253, 231, 37)]
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A curve with its band over repetitions."""

    label: str
    style: int  # colour and dash, from 0
    x: Float  # (n,)
    y: Float  # (n,) mean
    low: Float  # (n,)
    high: Float  # (n,)


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    span: tuple[float, float] | None = None,
    show: Callable[[float], str] | None = None,
) -> str:
    """Draw lines with bands in one panel; the vertical axis is logarithmic where values span over three decades.

    Args:
        title: above the panel.
        lines: at least one, with at least one finite point.
        x_label: below.
        span: least and greatest value, so that neighbouring panels have one scale; None: the lines' own.
        show: writes a number of the vertical axis; a short decimal if absent.

    """
    lines = [thinned for line in lines if (thinned := _thin(line)).x.size]
    low, high = span_of(lines) if span is None else span
    right = max(float(line.x.max()) for line in lines)
    left = min(0.0, *(float(line.x.min()) for line in lines))
    logarithmic = low > 0 and high / low > 1e3
    down = np.log10 if logarithmic else np.asarray
    bottom, top = _padded(float(down(low)), float(down(high)))
    across = _scale(left, right if right > left else left + 1, _LEFT, _WIDTH - _RIGHT)
    upward = _scale(bottom, top, _HEIGHT - _BOTTOM, _TOP)
    parts = [_open(title, _WIDTH, _HEIGHT)]
    ticks = _decades(bottom, top) if logarithmic else _ticks(bottom, top)
    write = show or _short
    for tick in ticks:
        y = upward(np.array(tick)).item()
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text("tick", _LEFT - 6, y + 3.5, write(10**tick if logarithmic else tick), "end"))
    for tick in _ticks(left, right, most=5):
        x = across(np.array(tick)).item()
        parts.append(f'<path class="axis" d="M{x:.1f} {_HEIGHT - _BOTTOM}v4"/>')
        parts.append(_text("tick", x, _HEIGHT - _BOTTOM + 16, _short(tick)))
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    scale = " · logarithmic upward" if logarithmic else ""
    parts.append(_text("label", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label + scale))
    for line in sorted(lines, key=lambda line: -line.style):  # the first ones on top
        style = f"s{line.style}" if line.style < NUM_STYLES else "more"
        xs = across(line.x)
        ys, under, over = (upward(np.asarray(down(v))) for v in (line.y, line.low, line.high))
        if line.style < NUM_STYLES and not np.array_equal(under, over):
            band = _path(np.concatenate([xs, xs[::-1]]), np.concatenate([under, over[::-1]]))
            parts.append(f'<path class="band {style}" d="{band}Z"/>')
        last = escape(f"{line.label}: {write(float(line.y[-1]))}")
        parts.append(f'<path class="line {style}" d="{_path(xs, ys)}"><title>{last}</title></path>')
        if xs.size == 1:
            parts.append(f'<circle class="dot {style}" cx="{xs[0]:.1f}" cy="{ys[0]:.1f}" r="3"/>')
    return "".join([*parts, "</svg>"])


def span_of(lines: Sequence[Line]) -> tuple[float, float]:
    """Return the least and greatest finite value of some lines' bands; (0, 1) where there is none."""
    ends = np.concatenate([part for line in lines for part in (line.low, line.high)])
    finite = ends[np.isfinite(ends)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _open(title: str, width: int, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f'<text class="title" x="4" y="15">{escape(title)}</text>'
    )


def _thin(line: Line) -> Line:
    """Drop what is not finite, and points beyond what a panel can show, never the last."""
    keep = np.flatnonzero(np.isfinite(line.y) & np.isfinite(line.low) & np.isfinite(line.high))
    if keep.size > _MAX_POINTS:
        keep = keep[np.unique(np.linspace(0, keep.size - 1, _MAX_POINTS).round().astype(np.int64))]
    x, y, low, high = (values[keep] for values in (line.x, line.y, line.low, line.high))
    return Line(line.label, line.style, x, y, low, high)


def _padded(low: float, high: float) -> tuple[float, float]:
    span = high - low or abs(high) or 1.0
    return low - 0.04 * span, high + 0.04 * span


def _scale(low: float, high: float, start: float, end: float) -> Callable[[Float], Float]:
    return lambda values: start + (values - low) / (high - low) * (end - start)


def _path(x: Float, y: Float) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within a range, at most `most` of them.

    >>> _ticks(0, 100, 5), _ticks(0.13, 0.87)
    ([0.0, 25.0, 50.0, 75.0, 100.0], [0.2, 0.4, 0.6, 0.8])
    """
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / most))
    steps = (factor * power for factor in (1, 2, 2.5, 5, 10, 20, 25, 50))
    step = next(step for step in steps if math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Return the exponents of powers of ten within a range of exponents, at most seven."""
    whole = range(math.ceil(low), math.floor(high) + 1)
    every = max(1, math.ceil(len(whole) / 7))
    return [float(power) for power in whole if power % every == 0]


def _short(value: float) -> str:
    """Return a tick's number: 1e−05, −0.25, 1500, 2M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit and abs(value) < 1e13:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def heat_map(
    title: str,
    values: Float,
    *,
    axes: tuple[str, str],
    span: tuple[float, float],
    names: tuple[Sequence[str], Sequence[str]] | None = None,
    show: Callable[[float], str] = _short,
) -> str:
    """Draw a matrix as colours from dark (low) to light (high); what is missing shows the page through.

    Args:
        title: above.
        values: (R, C), NaN where missing.
        axes: labels of the vertical and the horizontal axis.
        span: the values of the darkest and the lightest colour.
        names: of rows and columns, or of the first and the last alone; numbers if there are none. Where all are given
            and fit, they are drawn, and numbers are written into the cells.
        show: writes a number.

    """
    rows, columns = values.shape
    named = names is not None and (len(names[0]), len(names[1])) == values.shape and rows <= 30 and columns <= 12
    left = min(150, 16 + max((len(name) for name in names[0]), default=0) * 7) if named and names else 40
    wide = max(_WIDTH - left - _RIGHT, 44 * columns) if named else _WIDTH - left - _RIGHT
    tall = 22 * rows if named else min(max(5 * rows, 130), 200)
    height = _TOP + tall + 36
    parts = [_open(title, left + wide + _RIGHT, height)]
    parts.append(
        f'<image x="{left}" y="{_TOP}" width="{wide}" height="{tall}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{_png(_colours(values, span))}"/>'
    )
    bottom = _TOP + tall
    if named and names:
        parts += _cells(values, span, names, (left, wide, tall), show)
    else:
        (top_name, *_, low_name), (first, *_, last) = (
            own if len(own) > 1 else ("0", str(count - 1))
            for own, count in zip(names or ((), ()), values.shape, strict=True)
        )
        for text, y in ((top_name, _TOP + 9), (low_name, bottom)):
            parts.append(_text("tick", left - 5, y, text, "end"))
        parts.append(_text("tick", left, bottom + 14, first, "start"))
        parts.append(_text("tick", left + wide, bottom + 14, last, "end"))
        turned = f'<g transform="translate(12 {_TOP + tall / 2:.1f}) rotate(-90)">{_text("label", 0, 0, axes[0])}</g>'
        parts.append(turned)
    parts.append(_text("label", left + wide / 2, height - 6, axes[1]))
    return "".join([*parts, "</svg>"])


def _cells(
    values: Float, span: tuple[float, float], names: tuple[Sequence[str], Sequence[str]],
    box: tuple[float, float, float], show: Callable[[float], str],
) -> list[str]:  # fmt: skip
    left, wide, tall = box
    rows, columns = values.shape
    parts = []
    for r, name in enumerate(names[0]):
        y = _TOP + (r + 0.5) * tall / rows + 4
        parts.append(_text("tick", left - 5, y, name, "end"))
        for c in range(columns):
            if math.isfinite(values[r, c]):
                light = (values[r, c] - span[0]) / ((span[1] - span[0]) or 1) > 0.6
                x = left + (c + 0.5) * wide / columns
                parts.append(_text("cell on-light" if light else "cell", x, y, show(float(values[r, c]))))
    for c, name in enumerate(names[1]):
        parts.append(_text("tick", left + (c + 0.5) * wide / columns, _TOP + tall + 14, name))
    return parts


def colour_bar(span: tuple[float, float], show: Callable[[float], str] = _short) -> str:
    """Draw the scale of heat-maps."""
    image = _png(_colours(np.linspace(0, 1, 128)[None], (0.0, 1.0)))
    low, high = (escape(show(value)) for value in span)
    return f'<span class="bar">{low} <img alt="" src="{image}"> {high}</span>'


def _colours(values: Float, span: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Return the colours (R, C, 4) of values (R, C); NaN is transparent."""
    share = np.clip((values - span[0]) / ((span[1] - span[0]) or 1.0), 0, 1)  # (R, C)
    missing = ~np.isfinite(share)
    at = np.where(missing, 0, share) * (len(_VIRIDIS) - 1)  # (R, C)
    red_green_blue = [np.interp(at, np.arange(len(_VIRIDIS)), _VIRIDIS[:, i]) for i in range(3)]
    return np.stack([*red_green_blue, np.where(missing, 0, 255)], axis=-1).round().astype(np.uint8)  # (R, C, 4)


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels (R, C, 4) as a data URI. W3C PNG, second edition: signature, IHDR, IDAT, IEND."""
    rows, columns, _ = pixels.shape
    raw = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)  # filter 0 before each row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)  # 8 bits, RGBA
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw.tobytes(), 9)) + chunk(b"IEND", b"")
    return data_uri(b"\x89PNG\r\n\x1a\n" + body)


def data_uri(png: bytes) -> str:
    """Return the bytes of a PNG so that a page can hold them."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
