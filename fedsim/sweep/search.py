"""What tuning tries and what it takes: the same points for every method, chosen on validation data alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedsim.sweep.grammar import Axis, Interval, bare
from fedsim.sweep.plan import product
from fedsim.sweep.table import Row

Point = tuple[tuple[str, ...], dict[str, Any]]
"""Overrides of a point of the search space, and key → value."""

_NEAR = 0.05  # share of an interval, in its scale, that counts as its edge


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How methods are tuned: the settings `tune.…`.

    Raises:
        ValueError: a value out of its range.

    """

    each: str | tuple[str, ...] = "strategy"  # keys; each combination of their values is a method, tuned by itself
    search: Literal["grid", "random", "optuna"] | None = None  # None: random if there is an interval, else grid
    trials: int | None = None  # points of a search that draws, ≥ 1, the same number for each method; None: 20
    seeds: int | tuple[int, ...] = (1000,)  # of the search alone, ≥ 0; the reported runs have those of `seed=`
    metric: Literal["validation_accuracy", "validation_loss"] = "validation_accuracy"  # of the last round
    seed: int = 0  # of the random search's draws, ≥ 0

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be >= 1, got {self.trials}")
        if not self.tuning_seeds or min(self.tuning_seeds) < 0 or len(set(self.tuning_seeds)) < len(self.tuning_seeds):
            raise ValueError(f"seeds must be one or several different integers >= 0, got {self.seeds}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    @property
    def num_trials(self) -> int:
        """Points of a search that draws."""
        return 20 if self.trials is None else self.trials

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that make a method."""
        return (self.each,) if isinstance(self.each, str) else tuple(self.each)

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """The seeds of the search."""
        return (self.seeds,) if isinstance(self.seeds, int) else tuple(self.seeds)


def points(axes: Sequence[Axis], intervals: Sequence[Interval], tuning: Tuning) -> list[Point]:
    """Return the points that every method is tried at.

    A grid has all combinations. A random search draws `trials` points, from lists without repetition where there
    are no intervals; numbers from an interval are uniform in x or, tagged `log`, in log x, and rounded to four
    digits. The draws are functions of (tune.seed, point) alone.

    Raises:
        ValueError: an interval in a grid search, or a number of trials for one.

    """
    if tuning.search == "optuna":  # each method is tried at points of its own: `adaptive.explore`
        return []
    grid = list(product(axes))
    if tuning.search == "grid" or (tuning.search is None and not intervals):
        if intervals:
            raise ValueError(f"{intervals[0].key}: a grid needs a list of values; an interval needs tune.search=random")
        if tuning.trials is not None:
            raise ValueError("tune.trials is for tune.search=random; a grid has one trial for each combination")
        return grid
    number = tuning.num_trials
    if not intervals:
        order = _generator(tuning.seed, "tune").permutation(len(grid))[:number]
        return [grid[i] for i in sorted(order.tolist())]
    return [_drawn(grid, intervals, tuning.seed, j) for j in range(number)]


def _drawn(grid: Sequence[Point], intervals: Sequence[Interval], seed: int, number: int) -> Point:
    rng = _generator(seed, "tune", number)
    overrides, values = grid[int(rng.integers(len(grid)))]
    drawn = {interval.key: _number(interval, float(rng.random())) for interval in intervals}
    return (
        (*overrides, *(f"{key}={value}" for key, value in drawn.items())),
        {**values, **{bare(key): value for key, value in drawn.items()}},
    )


def _number(interval: Interval, share: float) -> float | int:
    """Return the number at a share in [0, 1) of an interval."""
    low, high = interval.low, interval.high
    if interval.whole:
        return min(int(high), int(_at(interval._replace(high=high + 1), share)))
    return min(high, max(low, float(f"{_at(interval, share):.4g}")))


def _at(interval: Interval, share: float) -> float:
    low, high = interval.low, interval.high
    if interval.log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)


def score(rows: Sequence[Row], metric: str) -> float:
    """Return the mean of a validation figure over a point's trials; one that failed makes it the worst of all."""
    known = [row.get(metric) for row in rows]
    worst = math.inf if metric == "validation_loss" else -math.inf
    if not known or any(value is None for value in known):
        return worst
    return math.fsum(known) / len(known)  # type: ignore[arg-type]


def best(scores: Sequence[float], metric: str) -> int | None:
    """Return the position of the best score, the first of equals; None if no point has one."""
    sign = -1.0 if metric == "validation_loss" else 1.0
    if not any(map(math.isfinite, scores)):
        return None
    return max(range(len(scores)), key=lambda i: (sign * scores[i], -i))


def edges(
    chosen: Mapping[str, Any], axes: Sequence[Axis], intervals: Sequence[Interval]
) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, "lowest" or "highest") where a chosen number lies on the edge of what was tried.

    A better one may lie beyond. Settings whose values are not numbers have no edge, nor has a single value.
    """
    for axis in axes:
        numbers = [v for v in axis.values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < max(2, len(axis.values)):
            continue
        value = chosen[bare(axis.key)]
        if value in (min(numbers), max(numbers)):
            yield bare(axis.key), value, "lowest" if value == min(numbers) else "highest"
    for interval in intervals:
        value = chosen[bare(interval.key)]
        scale = math.log if interval.log else float
        share = (scale(value) - scale(interval.low)) / (scale(interval.high) - scale(interval.low))
        if not _NEAR < share < 1 - _NEAR:
            yield bare(interval.key), value, "lowest" if share <= _NEAR else "highest"


def with_seeds(method: Point, listed: Sequence[Point], seeds: Sequence[int]) -> Iterator[Point]:
    """Yield every trial of a method: each point with each seed, the seed fastest."""
    for (overrides, values), seed in itertools.product(listed, seeds):
        yield (*method[0], *overrides, f"seed={seed}"), {**method[1], **values, "seed": seed}


def _generator(*key: Any) -> Any:
    from fedsim.rng import generator  # here: it loads torch, which a wrong name should not wait for

    return generator(*key)
