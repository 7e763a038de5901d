"""What an experiment asks: arms, settings, seeds, and claims with their criterion. `configs/experiment/NAME.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from fedsim import catalogue
from fedsim.construct import construct
from fedsim.errors import UserError, did_you_mean
from fedsim.sweep import plan as plans
from fedsim.sweep import search
from fedsim.sweep.grammar import bare, read
from fedsim.sweep.search import Point, Tuning

GROUP = "experiment"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method of an experiment."""

    set: tuple[str, ...] = ()  # overrides
    tune: tuple[str, ...] = ()  # settings with several values: the points it is tried at, as many as every other arm's
    like: str | None = None  # an arm whose overrides, and whose chosen point, it takes; `set` wins
    best: tuple[
        str, ...
    ] = ()  # arms of which it is, in each seed, the one with the best figure; it has no runs of its own
    reseed: bool = False  # other data order under the same partition, initial model, cohorts and attackers
    replays: str | None = None  # an arm whose run of the same cell and seed it is given as strategy.run

    def points(self) -> list[Point]:
        """Return the points of its search; one without overrides where nothing is tuned."""
        words = read(self.tune)
        if words.fixed:
            raise ValueError(f"tune: {words.fixed[0]} has one value; it belongs into set")
        return search.points(words.axes, words.intervals, Tuning())


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That one arm is better than another, in every cell of the settings."""

    arm: str
    baseline: str
    text: str = ""
    controls: tuple[str, ...] = ()  # arms that must be beaten too, else the claim holds only through them


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment.

    Args:
        claims: `arm`, `baseline`, `text`, and `controls`, arms that have a part of what the method does.
        arms: name → overrides, or {set, tune, like, reseed, replays}, or {best}.
        base: overrides of every run.
        settings: settings with several values; their product are the cells.
        metric: column of a run's summary, or of its last round, that is compared; with a target, of its rows. It may
            name a setting of the cells: "recall_{devices.target_class}".
        beside: metrics whose means are shown, at runs' ends, and by which nothing is judged.
        target: what the metric has to reach; then the first `along` where it does is compared, less is better, and
            a run that never does counts as its end.
        along: "round" or another column that grows, "simulated_seconds", "bytes_up".
        better: "higher" or "lower" metric.
        scale: "linear", or "log" to compare natural logarithms, of figures > 0 that differ by factors: a difference of
            0.05 is then a twentieth.
        smallest: the smallest difference > 0 that matters, in units of what is compared.
        seeds: runs of each arm and cell, paired by partition, initial model and cohorts, ≥ 2.
        tuning_seeds: of the search, which reads validation data alone; none of them is among `seeds`, ≥ 1.
        tuning_metric: "validation_accuracy" or "validation_loss".
        null_control: an arm and a baseline between which there is nothing to find.
        positive_control: an arm and a baseline between which there is.

    Raises:
        ValueError: an argument out of its range, or an arm that there is not.

    """

    claims: Sequence[Any]
    arms: Mapping[str, Any]
    base: Sequence[str] = ()
    settings: Sequence[str] = ()
    metric: str = "accuracy"
    beside: Sequence[str] = ()
    target: float | None = None
    along: str = "round"
    better: Literal["higher", "lower"] = "higher"
    scale: Literal["linear", "log"] = "linear"
    smallest: float = 0.01
    seeds: int = 10
    tuning_seeds: int = 3
    tuning_metric: Literal["validation_accuracy", "validation_loss"] = "validation_accuracy"
    null_control: Mapping[str, str] | None = None
    positive_control: Mapping[str, str] | None = None
    methods: dict[str, Arm] = field(init=False)
    questions: tuple[Claim, ...] = field(init=False)

    def __post_init__(self) -> None:
        arms = {name: _arm(name, value) for name, value in self.arms.items()}
        object.__setattr__(self, "methods", {name: _resolved(name, arms) for name in arms})
        object.__setattr__(self, "questions", tuple(_claim(value, arms) for value in self.claims))
        for role in (self.null_control, self.positive_control):
            if role is not None:
                _claim(role, arms)
        if not self.smallest > 0:
            raise ValueError(f"smallest must be > 0, got {self.smallest}; what difference would matter?")
        if self.seeds < 2 or not 1 <= self.tuning_seeds <= FIRST_TUNING_SEED:
            raise ValueError(f"seeds must be >= 2 and tuning_seeds >= 1, got {self.seeds} and {self.tuning_seeds}")
        budgets = {name: len(arm.points()) for name, arm in self.own.items()}
        if len(set(budgets.values())) > 1:
            raise ValueError(f"every arm is tuned at as many points as every other, got {budgets}")

    @property
    def own(self) -> dict[str, Arm]:
        """Arms that have runs, and a choice, of their own."""
        return {name: arm for name, arm in self.methods.items() if arm.like is None and not arm.best}

    @property
    def tuned(self) -> bool:
        """Whether there is anything to choose."""
        return any(len(arm.points()) > 1 for arm in self.methods.values())

    @property
    def cells(self) -> list[Point]:
        """The product of the settings; one without overrides where there are none."""
        words = read(self.settings)
        if words.fixed or words.intervals:
            raise ValueError("settings: a setting with one value belongs into base, one with an interval into tune")
        return list(plans.product(words.axes))

    @property
    def sign(self) -> int:
        """What turns a difference into one of which more is better."""
        return -1 if self.target is not None or self.better == "lower" else 1


FIRST_TUNING_SEED = 1000


def load(name: str, config_dir: Path | None = None) -> dict[str, Any]:
    """Return what the YAML of an experiment says.

    Raises:
        UserError: there is none of that name.

    """
    known = catalogue.options(GROUP, catalogue.roots(config_dir))
    if name not in known:
        raise UserError(f"no experiment {name!r}{did_you_mean(name, known)}")
    tree: dict[str, Any] = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    tree.pop("_target_", None)
    return tree


def build(tree: Mapping[str, Any]) -> Study:
    """Return the experiment that a YAML describes.

    Raises:
        UserError: something is wrong in it.

    """
    study: Study = construct(Study, dict(tree), GROUP)
    return study


def merged(*parts: Sequence[str]) -> list[str]:
    """Return overrides of which a later one replaces an earlier one of the same setting.

    >>> merged(["client.lr=1", "seed=0"], ["client.lr=2"])
    ['client.lr=2', 'seed=0']
    """
    return list({bare(text.split("=", 1)[0]): text for part in parts for text in part}.values())


def _arm(name: str, value: Any) -> Arm:
    if isinstance(value, Mapping):
        unknown = set(value) - set(Arm.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"arms.{name} has no {sorted(unknown)[0]!r}; it may have set, tune, like, reseed, replays and best"
            )
        return Arm(**_tuples(value))
    return Arm(set=tuple(value))


def _resolved(name: str, arms: Mapping[str, Arm]) -> Arm:
    arm = arms[name]
    if arm.best:
        wrong = [other for other in arm.best if other not in arms or arms[other].best]
        if wrong or arm != Arm(best=arm.best):
            raise ValueError(f"arms.{name} is the best of arms that have runs, and has nothing else, got {arm.best}")
    if arm.replays is not None and (arm.replays not in arms or arms[arm.replays].replays is not None):
        raise ValueError(f"arms.{name} replays {arm.replays!r}, which is no arm that runs by itself")
    if arm.replays is not None and arm.like is None:
        raise ValueError(
            f"arms.{name} replays runs of the report, so that a search has none; say whose choice it takes"
        )
    if arm.like is None:
        return arm
    if arm.like not in arms or arms[arm.like].like is not None:
        raise ValueError(f"arms.{name} is like {arm.like!r}, which is no arm of its own")
    if arm.tune:
        raise ValueError(f"arms.{name} takes the choice of {arm.like}; leave tune out")
    return replace(arm, set=tuple(merged(arms[arm.like].set, arm.set)))


def _claim(value: Mapping[str, Any], arms: Mapping[str, Arm]) -> Claim:
    unknown = set(value) - set(Claim.__dataclass_fields__)
    if unknown or not {"arm", "baseline"} <= set(value):
        raise ValueError(f"a claim has arm and baseline, and may have text and controls, got {', '.join(value)}")
    claim = Claim(**_tuples(value))
    for name in (claim.arm, claim.baseline, *claim.controls):
        if name not in arms:
            raise ValueError(f"claims name the arm {name!r}{did_you_mean(name, arms)}")
    return claim


def _tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
