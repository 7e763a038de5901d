"""Adaptive search by Optuna: each method's next points are drawn where its own trials did well.

Fair as the other searches are: every method has the same number of trials, the same space, and a study of its own that
begins with the same seed, so that the first points, which are random, are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from fedsim.errors import UserError
from fedsim.sweep.grammar import Axis, Interval, bare
from fedsim.sweep.search import Point, Tuning, score, with_seeds
from fedsim.sweep.table import Row

GENERATION = 5  # points of each method that are tried side by side before the next are drawn


def explore(
    tuning: Tuning,
    methods: Sequence[Point],
    space: tuple[Sequence[Axis], Sequence[Interval]],
    run: Callable[[Sequence[Point]], Sequence[Row]],
) -> tuple[list[list[Point]], list[Row]]:
    """Try `tuning.num_trials` points of each method.

    A search that was cut off is gone through again: what is done is not run again, so its draws are the same ones.

    Args:
        tuning: how.
        methods: what is tuned.
        space: axes and intervals of the search space.
        run: does all trials so far that are not done, and returns the rows of all, in their order.

    Returns:
        The points of each method, and the rows of all trials, method by method.

    Raises:
        UserError: Optuna is not installed.

    """
    studies = [_study(tuning) for _ in methods]
    seeds = tuning.tuning_seeds
    points: list[list[Point]] = [[] for _ in methods]
    found: list[list[Row]] = [[] for _ in methods]
    listed: list[Point] = []
    while (missing := tuning.num_trials - len(points[0])) > 0:
        asked = [[study.ask() for _ in range(min(GENERATION, missing))] for study in studies]
        new = [[_point(trial, *space) for trial in trials] for trials in asked]
        for method, mine in zip(methods, new, strict=True):
            listed += with_seeds(method, mine, seeds)
        rows = list(run(listed))[-len(methods) * len(new[0]) * len(seeds) :]
        for m, block in enumerate(_cut(rows, len(new[0]) * len(seeds))):
            points[m] += new[m]
            found[m] += block
            for trial, repeated in zip(asked[m], _cut(block, len(seeds)), strict=True):
                _tell(studies[m], trial, score(repeated, tuning.metric))
    return points, [row for mine in found for row in mine]


def _cut(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[low : low + size] for low in range(0, len(rows), size))


def _study(tuning: Tuning) -> Any:
    try:
        optuna: Any = import_module("optuna")
    except ImportError as error:
        raise UserError("tune.search=optuna needs Optuna: pip install 'fedsim[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = "minimize" if tuning.metric == "validation_loss" else "maximize"
    return optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=tuning.seed))


def _tell(study: Any, trial: Any, value: float) -> None:
    if math.isfinite(value):
        study.tell(trial, value)
    else:
        study.tell(trial, state=import_module("optuna.trial").TrialState.FAIL)


def _point(trial: Any, axes: Sequence[Axis], intervals: Sequence[Interval]) -> Point:
    """Return the point that a study asks for; numbers of intervals are rounded to four digits, as in other searches."""
    overrides, values = [], {}
    for axis in axes:
        i = trial.suggest_categorical(bare(axis.key), list(range(len(axis.values))))
        overrides.append(f"{axis.key}={axis.texts[i]}")
        values[bare(axis.key)] = axis.values[i]
    for interval in intervals:
        name, low, high = bare(interval.key), interval.low, interval.high
        number: float | int
        if interval.whole:
            number = int(trial.suggest_int(name, int(low), int(high), log=interval.log))
        else:
            number = min(high, max(low, float(f"{trial.suggest_float(name, low, high, log=interval.log):.4g}")))
        overrides.append(f"{interval.key}={number}")
        values[name] = number
    return tuple(overrides), values
