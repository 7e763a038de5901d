"""Timelines and bar charts as inline SVG, in the style of `charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsim.report.charts import _open, _scale, _short, _text, _ticks

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]
Span = tuple[str, Int, Float, Float]
"""(style, row (n,), begin (n,), end (n,))."""

_WIDTH, _HEIGHT = 400, 180
_WIDE = 820
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 38
_ROW = 13  # pixels
_UNITS = ((7200.0, 3600.0, "simulated hours"), (120.0, 60.0, "simulated minutes"), (0.0, 1.0, "simulated seconds"))


def timeline(title: str, spans: Sequence[Span], dots: tuple[Int, Float], names: Sequence[str], end: float) -> str:
    """Draw spans of time in rows, the later in the list above the earlier, and dots on top.

    Args:
        title: above.
        spans: with the classes of their style; what lies beyond the end is cut off.
        dots: (row (n,), time (n,)).
        names: of the rows, from the top.
        end: seconds > 0 that fit; the axis begins at 0.

    """
    tall = _ROW * len(names)
    factor, label = next((factor, label) for least, factor, label in _UNITS if end >= least)
    across = _scale(0.0, end, _LEFT, _WIDE - _RIGHT)
    parts = [_open(title, _WIDE, _TOP + tall + _BOTTOM)]
    for row, name in enumerate(names):
        y = _TOP + _ROW * row
        parts.append(f'<path class="fill idle" d="M{_LEFT} {y + 1.5:.1f}H{_WIDE - _RIGHT}v{_ROW - 3}H{_LEFT}Z"/>')
        parts.append(_text("tick", _LEFT - 6, y + _ROW - 3.5, name, "end"))
    for style, rows, begin, stop in spans:
        thin = style == "held"
        height = 3.0 if thin else _ROW - 3.0
        low = _TOP + (_ROW - height) / 2
        boxes = [
            f"M{left:.1f} {low + _ROW * row:.1f}h{right - left:.2f}v{height:g}h{left - right:.2f}Z"
            for row, left, right in zip(
                rows.tolist(), across(begin).tolist(), across(stop.clip(max=end)).tolist(), strict=True
            )
            if right > left
        ]
        if boxes:
            parts.append(f'<path class="fill {style}" d="{"".join(boxes)}"/>')
    for row, time in zip(*(values.tolist() for values in dots), strict=True):
        if time <= end:
            x, y = across(np.array(time)).item(), _TOP + _ROW * (row + 0.5)
            parts.append(f'<circle class="late" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
    bottom = _TOP + tall
    for tick in _ticks(0.0, end / factor, most=8):
        x = across(np.array(tick * factor)).item()
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom + 2}v4"/>')
        parts.append(_text("tick", x, bottom + 18, _short(tick)))
    parts.append(_text("label", (_LEFT + _WIDE - _RIGHT) / 2, bottom + _BOTTOM - 5, label))
    turned = _text("label", 0, 0, "client")
    parts.append(f'<g transform="translate(12 {_TOP + tall / 2:.1f}) rotate(-90)">{turned}</g>')
    return "".join([*parts, "</svg>"])


def bars(title: str, values: Int, shares: Float, x_label: str) -> str:
    """Draw the share of each whole number, in percent; neighbours are put together where there are over 60.

    Args:
        title: above.
        values: (n,) ≥ 0, ascending.
        shares: (n,) in (0, 1].
        x_label: below.

    """
    width = math.ceil((int(values[-1]) + 1) / 60)  # of a bar
    heights = np.bincount(values // width, weights=100 * shares)  # (B,)
    across = _scale(0.0, float(len(heights) * width), _LEFT, _WIDTH - _RIGHT)
    upward = _scale(0.0, 1.05 * float(heights.max()), _HEIGHT - _BOTTOM, _TOP)
    parts = [_open(title, _WIDTH, _HEIGHT)]
    for tick in _ticks(0.0, 1.05 * float(heights.max()), most=5):
        y = upward(np.array(tick)).item()
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text("tick", _LEFT - 6, y + 3.5, _short(tick), "end"))
    gap = 0.1 * width if len(heights) <= 30 else 0.0
    for number in np.flatnonzero(heights).tolist():
        left, right = (across(np.array(edge)).item() for edge in (number * width + gap, (number + 1) * width - gap))
        top = upward(np.array(heights[number])).item()
        parts.append(
            f'<path class="fill f0" d="M{left:.1f} {_HEIGHT - _BOTTOM}V{top:.1f}H{right:.1f}V{_HEIGHT - _BOTTOM}Z"/>'
        )
    for tick in _ticks(0.0, float(len(heights) * width - 1), most=8):
        if tick == int(tick):
            x = across(np.array(tick + width / 2)).item()
            parts.append(_text("tick", x, _HEIGHT - _BOTTOM + 15, _short(tick)))
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    parts.append(_text("label", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label))
    return "".join([*parts, "</svg>"])
