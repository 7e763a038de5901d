r"""From paired runs to a verdict: interval, Holm, equivalence, power, controls.

A difference d_1 … d_n of two arms over n seeds, of which more is better, with mean d̄ and standard error s/√n:
    found          Student's paired test, Holm-adjusted over all cells of all claims (or of all controls)
    equivalent     two one-sided tests (Schuirmann, 1987): |d| < smallest, at 5 %
    detectable     (t_{.975} + t_{.8}) s/√n: what would have been found in four of five such experiments
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsim.report.statistics import LEVEL, Paired, holm, paired, t_inside, t_quantile

HOLDS = "holds"
THROUGH = "holds only through a control"
SMALL = "found, but less than matters"
OPPOSITE = "the opposite holds"
EQUAL = "no difference that matters"
OPEN = "not shown at this power"
DIVERGED = "not shown: runs diverged"


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How much better one arm is than another in one cell."""

    cell: str
    arm: str
    baseline: str
    test: Paired
    adjusted: float  # Holm's p
    equivalence: float  # p of the two one-sided tests
    detectable: float

    @property
    def found(self) -> bool:
        """Whether the arm is better, beyond chance."""
        return self.adjusted <= 1 - LEVEL and self.test.mean > 0

    @property
    def lost(self) -> bool:
        """Whether it is worse, beyond chance."""
        return self.adjusted <= 1 - LEVEL and self.test.mean < 0

    @property
    def diverged(self) -> bool:
        """Whether a run of either arm has no finite figure, so that the difference has no size."""
        return not math.isfinite(self.test.mean)


def effect(
    cell: str, names: tuple[str, str], runs: tuple[Sequence[float], Sequence[float]], *, sign: int, smallest: float
) -> Effect:
    """Compare the paired runs of two arms, of at least two seeds; p is not adjusted yet."""
    with np.errstate(invalid="ignore"):  # ∞ − ∞, of seeds with which both arms diverged
        difference = sign * (np.asarray(runs[0], dtype=np.float64) - np.asarray(runs[1], dtype=np.float64))  # (n,)
    test = paired(difference, np.zeros_like(difference))
    if test is None:
        raise ValueError(f"{cell}: {names[0]} against {names[1]} has fewer than two common seeds")
    df, error = test.count - 1, test.half / t_quantile(LEVEL, test.count - 1)
    return Effect(
        cell=cell, arm=names[0], baseline=names[1], test=test, adjusted=test.p,
        equivalence=equivalence(test.mean, error, df, smallest),
        detectable=(t_quantile(LEVEL, df) + t_quantile(0.6, df)) * error,
    )  # fmt: skip


def equivalence(mean: float, error: float, df: int, margin: float) -> float:
    """Return the p of two one-sided tests that a mean lies within ±margin; 1 for a mean that is not finite.

    >>> round(equivalence(0.0, 0.5, 9, 1.0), 4)  # P(T > 2) with 9 degrees of freedom
    0.0383
    """
    if not math.isfinite(mean):
        return 1.0
    if not error:
        return 0.0 if abs(mean) < margin else 1.0
    t = (margin - abs(mean)) / error
    tail = (1 - t_inside(abs(t), df)) / 2
    return tail if t > 0 else 1 - tail


def adjusted(effects: Sequence[Effect]) -> list[Effect]:
    """Return effects with Holm's p over all of them."""
    return [replace(one, adjusted=p) for one, p in zip(effects, holm([e.test.p for e in effects]), strict=True)]


def verdict(claimed: Effect, controls: Mapping[str, Effect], smallest: float) -> str:
    """Say what came of a claim in one cell.

    Args:
        claimed: the arm against its baseline.
        controls: name → the arm against a control, which has a part of what the arm does.
        smallest: the smallest difference that matters.

    """
    if claimed.diverged:
        return DIVERGED
    if claimed.lost:
        return OPPOSITE
    if claimed.found:
        if claimed.test.mean + claimed.test.half < smallest:
            return SMALL
        unbeaten = [name for name, one in controls.items() if not one.found]
        return f"{THROUGH}: {', '.join(unbeaten)}" if unbeaten else HOLDS
    return EQUAL if claimed.equivalence <= 1 - LEVEL else OPEN


def overall(verdicts: Sequence[str]) -> str:
    """Return one verdict for all cells: what all have, or how many have what."""
    kinds = [v.partition(":")[0] for v in verdicts]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    if len(counts) == 1:
        return kinds[0]
    return "; ".join(f"{kind} in {count} of {len(kinds)}" for kind, count in counts.items())
