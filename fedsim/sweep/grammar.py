"""Hydra's sweep grammar: which settings have one value, which have several, and what is said to the sweep itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from fedsim import catalogue, misfit
from fedsim.construct import construct
from fedsim.errors import UserError


class Axis(NamedTuple):
    """A setting with several values, in the order they were written."""

    key: str  # as it is written before "=", sign included
    texts: tuple[str, ...]  # what is written behind "=" for each value
    values: tuple[Any, ...]  # the same as plain Python values
    is_range: bool = False  # numbers of one kind: if the first and the last are allowed, all are


class Interval(NamedTuple):
    """A setting with a range of numbers to draw from."""

    key: str
    low: float
    high: float
    log: bool  # uniform in log x
    whole: bool  # integers, both ends included


class Words(NamedTuple):
    """What a command line says."""

    fixed: tuple[str, ...]  # overrides with one value
    axes: tuple[Axis, ...]
    intervals: tuple[Interval, ...]
    own: Mapping[str, Mapping[str, Any]]  # namespace ("sweep", "tune") → name → value
    folder: str | None  # hydra.sweep.dir
    resume: str | None

    def fixed_value(self, key: str) -> Any:
        """Return the value of an override that has one value; None if it is not given."""
        return next((o.value() for o in map(_parse, self.fixed) if o.key_or_group == key), None)

    def settings(self, kind: type, space: str) -> Any:
        """Return the command's own settings of a namespace as a dataclass of them.

        Raises:
            UserError: it has no such setting, or it is of a wrong type or out of its range.

        """
        known = dict.fromkeys(kind.__dataclass_fields__)  # type: ignore[attr-defined]  # it is a dataclass
        for name in self.own[space]:
            if name not in known:
                raise UserError(misfit.no_setting([space], name, known, {}))
        return construct(kind, self.own[space], space)


def read(words: Sequence[str], config_dir: Path | None = None, namespaces: Sequence[str] = ("sweep",)) -> Words:
    """Sort the words of a command.

    Args:
        words: in Hydra's grammar: `a=1,2`, `a=choice(1,2)`, `a=range(3)`, `strategy=glob(fed*)`, and
            `a=interval(0.1,1)`, `a=tag(log,interval(0.1,1))` for random search.
        config_dir: folder of further choices, for `glob`.
        namespaces: first parts of the keys that are the command's own, e.g. `sweep.workers=2`.

    Raises:
        UserError: a word is not in the grammar, or it is the sweep's to say.

    """
    fixed: list[str] = []
    axes: list[Axis] = []
    intervals: list[Interval] = []
    own: dict[str, dict[str, Any]] = {name: {} for name in namespaces}
    paths: dict[str, str] = {}
    seen: set[str] = set()
    for text in words:
        item = _parse(text)
        key = str(item.key_or_group)
        if key in seen:
            raise UserError(f"{key} is given twice; several values are written {key}=1,2")
        seen.add(key)
        space, _, name = key.partition(".")
        if space in own or key in ("hydra.sweep.dir", "resume"):
            value = _own_value(item, text)
            if space in own:
                own[space][name] = value
            else:
                paths[key] = str(value)
        elif key == "hydra.run.dir":
            raise UserError(f"{text}: every trial has a folder in that of the sweep, which is hydra.sweep.dir")
        elif item.value_type is None or not item.is_sweep_override():
            fixed.append(text)
        elif isinstance(item._value, IntervalSweep):
            intervals.append(_interval(item, item._value, text))
        else:
            axes.append(_axis(item, text, config_dir))
    return Words(tuple(fixed), tuple(axes), tuple(intervals), own, paths.get("hydra.sweep.dir"), paths.get("resume"))


def _parse(text: str) -> Override:
    try:
        item = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(misfit.grammar(text)) from error
    if not str(item.key_or_group).strip():
        raise UserError(misfit.grammar(text))
    return item


def _own_value(item: Override, text: str) -> Any:
    """Return the one value of a setting of the sweep's own; values in a row are a list."""
    if item.is_sweep_override():
        if not item.is_choice_sweep() or isinstance(item._value, Glob):
            raise UserError(f"{text}: {item.key_or_group} takes one value")
        return [Override._convert_value(value) for value in item.sweep_iterator()]
    return item.value()


def _axis(item: Override, text: str, config_dir: Path | None) -> Axis:
    key, value = item.get_key_element(), item._value
    if isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle:
        raise UserError(f"{text}: the order of the trials changes no result; leave shuffle out")
    if isinstance(value, Glob):
        names = tuple(value.filter(list(catalogue.options(str(item.key_or_group), catalogue.roots(config_dir)))))
        texts, values = names, names
    else:
        values = tuple(Override._convert_value(element) for element in item.sweep_iterator())
        try:
            texts = tuple(Transformer.str(element) for element in item.sweep_iterator())
        except OmegaConfBaseException as error:  # what Hydra makes of range(3),5
            raise UserError(f"{text}: write either a list of values or one range") from error
    if not values:
        raise UserError(f"{text} gives {item.key_or_group} no value")
    if len(set(texts)) < len(texts):
        twice = next(t for t in texts if texts.count(t) > 1)
        raise UserError(f"{text} gives {item.key_or_group} the value {twice} twice")
    return Axis(key, texts, values, isinstance(value, RangeSweep))


def _interval(item: Override, value: IntervalSweep, text: str) -> Interval:
    low, high = value.start, value.end
    if low is None or high is None or not low < high:
        raise UserError(f"{text}: an interval is written interval(low,high) with low < high")
    log = "log" in value.tags
    if log and low <= 0:
        raise UserError(f"{text}: an interval in log scale begins above 0")
    whole = isinstance(low, int) and isinstance(high, int)
    return Interval(item.get_key_element(), float(low), float(high), log, whole)


def bare(key: str) -> str:
    """Return a key without the sign that adds it.

    >>> bare("++client.mu")
    'client.mu'
    """
    return re.sub(r"^[+~]+", "", key)
