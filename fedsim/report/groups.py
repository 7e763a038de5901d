"""Which runs belong together: repetitions of a method in a setting, named by the least that tells them apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.report.runs import Run, is_seed

# What decides no number, or only where and how it is computed.
IGNORED = ("resume", "tracker", "checkpoint", "threads", "engine.workers", "sweep", "data.root")
METHOD = ("strategy", "client")  # these say what is compared; all else is the setting in which it is


@dataclass(frozen=True)
class Group:
    """The repetitions of one method in one setting."""

    method: str
    setting: str
    runs: tuple[Run, ...]  # by seeds

    @property
    def name(self) -> str:
        """Method and setting."""
        return self.method + (f" · {self.setting}" if self.setting else "")

    def by_seeds(self, metric: str) -> dict[tuple[Any, ...], float]:
        """Return seeds → result of the runs that have it; a repeated seed gets a number."""
        found: dict[tuple[Any, ...], float] = {}
        for run in self.runs:
            if metric in run.results:
                repeat = sum(key[0] == run.seeds for key in found)
                found[(run.seeds, repeat)] = run.results[metric]
        return found


@dataclass(frozen=True)
class Table:
    """All groups of a report, methods × settings."""

    methods: tuple[str, ...]
    settings: tuple[str, ...]  # "" alone where there is one
    groups: Mapping[tuple[str, str], Group]  # (method, setting)

    def in_setting(self, setting: str) -> list[Group]:
        """Return the groups of a setting, by method."""
        return [self.groups[m, setting] for m in self.methods if (m, setting) in self.groups]

    @property
    def all(self) -> list[Group]:
        """All groups, by setting, then by method."""
        return [group for setting in self.settings for group in self.in_setting(setting)]


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys (and groups, for their choice) in which runs differ, but for seeds; in the config's order."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not _ignored(key) and not is_seed(key))
    choices = dict.fromkeys(name for run in runs for name in run.choices if not _ignored(name))
    names = [*choices, *keys]
    return [name for name in names if len({rank(value_of(run, name)) for run in runs}) > 1]


def _ignored(key: str) -> bool:
    return key.endswith("._target_") or any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def value_of(run: Run, name: str) -> Any:
    """Return what a run has under a key, or the choice of a group; None where it has neither."""
    return run.choices.get(name, run.config.get(name))


def written(value: Any) -> str:
    """Return a value as it is written on the command line.

    >>> written(None), written(True), written(("a", 1)), written(0.1)
    ('null', 'true', '[a,1]', '0.1')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(written, value)) + "]" if isinstance(value, tuple) else str(value)


def group(runs: Sequence[Run]) -> Table:
    """Sort runs into repetitions of methods in settings.

    A label names the fewest keys that tell configs apart, the user's own first: a client that always comes with its
    strategy is not in it. Where one method ran in several settings, the settings are what is compared.
    """
    keys = _by_interest(runs, differing(runs))
    methods, settings = _split(keys)
    chosen = _telling(runs, methods), _telling(runs, settings)
    if not chosen[0]:
        chosen = chosen[1], []
    names = [_namer(runs, part) for part in chosen]
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((names[0](run) or run.choices.get("strategy", "run"), names[1](run)), []).append(run)
    # Sorted by the values themselves, so that alpha=1 stands after 0.1 and before 10.
    order = sorted(found, key=lambda pair: [rank(value_of(found[pair][0], name)) for part in chosen for name in part])
    groups = {
        pair: Group(*pair, tuple(sorted(found[pair], key=lambda run: [rank(seed) for seed in run.seeds])))
        for pair in order
    }
    columns = sorted(groups, key=lambda pair: [rank(value_of(groups[pair].runs[0], name)) for name in chosen[1]])
    return Table(tuple(dict.fromkeys(m for m, _ in order)), tuple(dict.fromkeys(s for _, s in columns)), groups)


def _split(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    methods = [key for key in keys if re.split("[.@]", key)[0] in METHOD]  # strategy@strategy.rule: an inner rule
    return methods, [key for key in keys if key not in methods]


def _by_interest(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Put strategy first, then other choices, then what the user gave, then the rest."""
    given = {text.split("=", 1)[0].lstrip("+~") for run in runs for text in run.overrides}
    groups = {name for run in runs for name in run.choices}
    return sorted(keys, key=lambda key: (key != "strategy", key not in groups, key not in given))


def _telling(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """Return the keys, of those given, that each tell apart some runs which the ones before do not."""
    chosen: list[str] = []
    classes = 1
    for key in keys:
        split = len({tuple(rank(value_of(run, name)) for name in (*chosen, key)) for run in runs})
        if split > classes:
            chosen, classes = [*chosen, key], split
    return chosen


def _namer(runs: Sequence[Run], keys: Sequence[str]) -> Callable[[Run], str]:
    """Return what names a run by some keys, each by its last part where no other ends alike."""
    groups = {name for run in runs for name in run.choices}
    tails = [key.rpartition(".")[2] for key in keys]
    heads = {key: key if tails.count(tail) > 1 else tail for key, tail in zip(keys, tails, strict=True)}

    def name(run: Run) -> str:
        parts = []
        for key in keys:
            value = value_of(run, key)
            if key in groups:
                parts.append(str(value) if key in METHOD else f"{key}={value}")
            elif key in run.config:
                parts.append(f"{heads[key]}={written(value)}")
        return " ".join(parts)

    return name


def rank(value: Any) -> tuple[int, float, str]:
    """Return what sorts values of any kind: numbers by value, then the rest by name; 1 and 1.0 are equal."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))
