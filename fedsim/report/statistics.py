r"""The few statistics that a fair table needs: Student's t, intervals over seeds, paired tests, Holm's correction.

Degrees of freedom are whole numbers here (runs − 1), for which Student's distribution is a finite sum
(Abramowitz & Stegun 1964, 26.7.3 and 26.7.4), so that nothing is approximated and no further package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

LEVEL = 0.95  # of intervals; a difference counts where its adjusted p is at most 1 − LEVEL


def t_inside(t: float, df: int) -> float:
    """Return P(|T| ≤ t) of Student's t with df ≥ 1 degrees of freedom, t ≥ 0.

    >>> round(t_inside(12.706, 1), 4), round(t_inside(2.776, 4), 4)
    (0.95, 0.95)
    """
    if df < 1 or t < 0:
        raise ValueError(f"Student's t needs df >= 1 and t >= 0, got df={df}, t={t}")
    if math.isinf(t):
        return 1.0
    theta = math.atan(t / math.sqrt(df))
    cosine = math.cos(theta)
    if df % 2:  # 26.7.3: (2/π)(θ + sin θ [cos θ + 2/3 cos³ θ + … ])
        term, total = cosine, 0.0
        for i in range(1, df - 1, 2):
            total += term
            term *= cosine**2 * (i + 1) / (i + 2)
        return min(1.0, 2 / math.pi * (theta + math.sin(theta) * total))
    term, total = 1.0, 0.0  # 26.7.4: sin θ [1 + 1/2 cos² θ + 1·3/(2·4) cos⁴ θ + … ]
    for i in range(1, df, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    return min(1.0, math.sin(theta) * total)


def t_quantile(level: float, df: int) -> float:
    """Return the t with P(|T| ≤ t) = level in [0, 1), by bisection to the last bit.

    >>> round(t_quantile(0.95, 4), 3)
    2.776
    """
    if not 0 <= level < 1:
        raise ValueError(f"level must be in [0, 1), got {level}")
    low, high = 0.0, 1.0
    while t_inside(high, df) < level:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_inside(middle, df) < level else (low, middle)
    return high


@dataclass(frozen=True)
class Mean:
    """A mean over runs with its 95 % interval, mean ± half; half is None for a single run."""

    mean: float
    half: float | None
    count: int


def mean_of(values: Sequence[float] | Float) -> Mean:
    """Return mean and Student's interval of at least one value: t_{n−1} s / √n."""
    x = np.asarray(values, dtype=np.float64)  # (n,)
    count = len(x)
    if count < 2:
        return Mean(float(x.mean()), None, count)
    half = t_quantile(LEVEL, count - 1) * float(x.std(ddof=1)) / math.sqrt(count)
    return Mean(float(x.mean()), half, count)


@dataclass(frozen=True)
class Paired:
    """The mean difference of pairs, its 95 % interval mean ± half, and the two-sided p of Student's paired test."""

    mean: float
    half: float
    p: float
    count: int


def paired(a: Sequence[float] | Float, b: Sequence[float] | Float) -> Paired | None:
    """Test a − b, pair by pair; None for fewer than two pairs, which say nothing about chance.

    Differences that all agree to rounding have no spread, so Student's t does not exist: p is 1 where they are 0 (the
    same method under two names), and that of the sign test elsewhere, 2 · 2⁻ⁿ. Where a value is not finite p is 1: of
    a run that diverged no size of a difference is known.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)  # (n,)
    count = len(x)
    if count < 2:
        return None
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        difference = x - y  # (n,)
        mean = float(difference.mean())
    if not math.isfinite(mean):
        return Paired(mean, math.nan, 1.0, count)
    deviation = float(difference.std(ddof=1))
    rounding = (
        8 * np.finfo(np.float64).eps * max(float(np.maximum(abs(x), abs(y)).max()), float(np.finfo(np.float64).tiny))
    )
    if deviation <= rounding:
        return Paired(mean, 0.0, 1.0 if abs(mean) <= rounding else 2.0 ** (1 - count), count)
    error = deviation / math.sqrt(count)
    p = 1 - t_inside(abs(mean) / error, count - 1)
    return Paired(mean, t_quantile(LEVEL, count - 1) * error, max(p, 0.0), count)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for having asked several questions at once. Holm, Scand. J. Statist. 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
