"""Run folders as a report reads them: config, rows, results. Nothing here writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from fedsim.errors import UserError
from fedsim.metrics.records import RoundLog
from fedsim.misfit import quoted
from fedsim.quantities import flat

Float = npt.NDArray[np.float64]

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, fast, where libyaml is there
_MAX_DEPTH = 4  # of run folders below a folder that is given: outputs/2026-01-31/12-00-00-fedavg is two


@dataclass(frozen=True)
class Run:
    """One run, finished or not."""

    folder: Path
    name: str  # its folder, as short as it is unique among the runs read with it
    config: Mapping[str, Any]  # dotted key → value, without Hydra's own node
    choices: Mapping[str, str]  # group → choice
    overrides: tuple[str, ...]  # as the user gave them
    rows: Sequence[Mapping[str, Any]] = field(repr=False)  # of rounds.jsonl
    summary: Mapping[str, Any] | None = field(repr=False)  # None: the run has not ended

    @property
    def seeds(self) -> tuple[Any, ...]:
        """What all randomness follows from: runs of two methods with equal seeds are a pair."""
        return tuple(value for key, value in sorted(self.config.items()) if is_seed(key))

    @cached_property
    def results(self) -> dict[str, float]:
        """Name → number: of the summary, or the last known of each column where there is none."""
        if self.summary is not None:
            named = flat({k: v for k, v in self.summary.items() if k not in ("plan", "choices", "seed")})
        else:
            named = [(name, value) for row in self.rows for name, value in row.items() if value is not None]
        return {n: float(v) for n, v in named if isinstance(v, int | float) and not isinstance(v, bool)}

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns that hold a number in some row."""
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(n for n, v in row.items() if isinstance(v, int | float) and v is not None))
        return [name for name in names if name not in ("round", "evaluated")]

    def series(self, name: str) -> tuple[Float, Float]:
        """Return (rounds, values) of a column, (n,) each, where it was measured."""
        repeated = name in ("accuracy", "loss")  # such rows repeat the last known value where they are not evaluated
        kept = [
            (row["round"], row[name])
            for row in self.rows
            if row.get(name) is not None and not (repeated and row.get("evaluated") is False)
        ]
        both = np.array(kept, dtype=np.float64).reshape(-1, 2)  # (n, 2)
        return both[:, 0], both[:, 1]

    def total(self, *names: str) -> Float:
        """Return the running sum of some columns over all rounds (n,), missing values as 0."""
        return np.cumsum([sum(float(row.get(name) or 0) for name in names) for row in self.rows], dtype=np.float64)


def is_seed(key: str) -> bool:
    """Say whether a config key is a seed: runs that differ in no other key are repetitions.

    >>> is_seed("seed"), is_seed("partition.seed"), is_seed("strategy.seedling")
    (True, True, False)
    """
    return key == "seed" or key.endswith(".seed")


def read(folders: Sequence[Path]) -> list[Run]:
    """Read all runs in some folders: run folders, or folders with run folders in them.

    Raises:
        UserError: a folder has no runs in it, or a file of one is damaged.

    """
    found: dict[Path, None] = {}
    for folder in folders:
        inside = list(_run_folders(folder, _MAX_DEPTH)) if folder.is_dir() else []
        if not inside:
            what = "holds no runs: no config.yaml with rounds.jsonl" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {what}{_how_to_go_on(folder)}")
        found.update(dict.fromkeys(path.resolve() for path in inside))
    paths = sorted(found, key=lambda path: [(not part.isdigit(), part.rjust(12, "0")) for part in path.parts])
    names = _short([path.parts for path in paths])
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _how_to_go_on(folder: Path) -> str:
    """Name the command that makes runs of a folder whose sweep, search or replicas ended before their first rounds."""
    if (folder / "search" / "trials.json").is_file():
        verb, what = "tune", "search"
    elif (folder / "trials.json").is_file():
        words = json.loads((folder / "trials.json").read_text(encoding="utf-8")).get("words", ())
        replicas = any(word.lstrip("+").startswith("replicas=") for word in words)
        verb, what = ("run", "replicas") if replicas else ("sweep", "sweep")
    else:
        return ""
    return f"; its {what} ended early, go on with: fedsim {verb} {quoted('resume', str(folder))}"


def is_search(folder: Path) -> bool:
    """Say whether a folder is the search of a tuning or an experiment: its runs are for choosing, not for reporting."""
    return folder.name == "search" and (folder / "trials.json").is_file()


def num_unread(folders: Sequence[Path]) -> int:
    """Count the runs in some folders that have no round: begun ones, and trials of a sweep that never began."""
    found: set[Path] = set()
    for folder in folders:
        for depth in range(_MAX_DEPTH + 1):
            found.update(path.parent for path in folder.glob("*/" * depth + "plan.json"))
            for path in folder.glob("*/" * depth + "sweep.json"):
                rows = json.loads(path.read_text(encoding="utf-8"))["trials"]
                found.update(path.parent / row["trial"] for row in rows if row["state"] != "done")
    begun, given = {path.resolve() for path in found}, {folder.resolve() for folder in folders}
    return sum(not (path / "rounds.jsonl").is_file() and not _in_search(path, given) for path in begun)


def _in_search(path: Path, given: set[Path]) -> bool:
    """Say whether a run is of a search, where the search itself is not among the folders that were given."""
    for folder in path.parents:
        if folder in given:
            return False
        if is_search(folder):
            return True
    return False


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file() and (folder / "rounds.jsonl").is_file():
        yield folder
    elif depth:
        for child in folder.iterdir():
            if child.is_dir() and child.name[0] != "." and not is_search(child):
                yield from _run_folders(child, depth - 1)


def _short(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Drop the folders that all paths begin with, but never the last one."""
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    return ["/".join(path[common:]) for path in paths]


def _read(folder: Path, name: str) -> Run:
    path = folder / "config.yaml"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML)
        hydra = tree.pop("hydra")
        choices = {str(group): str(choice) for group, choice in hydra["runtime"]["choices"].items()}
        overrides = tuple(hydra["overrides"]["task"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a run: {' '.join(str(error).split())}") from error
    summary = folder / "summary.json"
    try:
        results = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None
    except ValueError as error:
        raise UserError(f"{summary} cannot be read: {error}") from error
    rows = RoundLog.read(folder / "rounds.jsonl")
    return Run(folder, name, dict(_leaves(tree)), choices, overrides, rows, results)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", tuple(value) if isinstance(value, list) else value
