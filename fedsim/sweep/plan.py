"""The trials of a sweep: their overrides, their folders, and the file from which a sweep goes on."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedsim import catalogue
from fedsim.config import Config, compose
from fedsim.errors import UserError
from fedsim.files import atomic
from fedsim.sweep.grammar import Axis, Words, bare

FILE = "trials.json"
_RATES = ("lr", "lr_decay")  # of clients; the numbers of a strategy are its own rule's


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    name: str  # of its folder in that of the sweep
    overrides: tuple[str, ...]  # all that `fedsim run` needs to do the same
    values: Mapping[str, Any] = field(default_factory=dict)  # swept key → its value here


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All runs of a sweep, in order."""

    words: tuple[str, ...]  # as the sweep was asked for
    config_dir: str | None
    threads: int | None  # CPU threads of every trial; None: as a run alone decides
    trials: tuple[Trial, ...]
    parts: tuple[str, ...] = ()  # groups in whose place objects from Python stood, which no file holds

    @property
    def keys(self) -> list[str]:
        """The swept keys."""
        return list(self.trials[0].values) if self.trials else []


def product(axes: Sequence[Axis]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield (overrides, key → value) of each point of a grid; the last axis runs fastest."""
    for picks in itertools.product(*(range(len(axis.values)) for axis in axes)):
        pairs = list(zip(axes, picks, strict=True))
        yield (
            tuple(f"{axis.key}={axis.texts[i]}" for axis, i in pairs),
            {bare(axis.key): axis.values[i] for axis, i in pairs},
        )


def trials_of(
    points: Iterable[tuple[tuple[str, ...], dict[str, Any]]],
    fixed: Sequence[str],
    threads: int | None,
    total: int | None = None,
) -> tuple[Trial, ...]:
    """Give each point its overrides and a name that sorts and that a shell and Hydra take without quotes.

    >>> [t.name for t in trials_of([(("strategy=flower/krum", "partition.alpha=0.1"),
    ...     {"strategy": "flower/krum", "partition.alpha": 0.1})], (), None)]
    ['0-flower-krum-alpha-0.1']
    """
    listed, own = list(points), [f"threads={threads}"] if threads is not None else []
    width, groups = len(str((total or len(listed)) - 1)), catalogue.groups(catalogue.roots())
    return tuple(
        Trial(name=f"{i:0{width}d}{_slug(values, groups)}", overrides=(*fixed, *own, *overrides), values=values)
        for i, (overrides, values) in enumerate(listed)
    )


def _slug(values: Mapping[str, Any], groups: Sequence[str], most: int = 80) -> str:
    parts = [str(value) if key in groups else f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    text = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-.")[:most]
    return f"-{text}".rstrip("-.")


def batches(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Group trials that differ only in seeds and in rates: they can train as one program.

    >>> one, two, far = (Trial(name="", overrides=(), values=v) for v in (
    ...     {"seed": 0, "client.lr": 0.1, "model": "mlp"}, {"seed": 1, "client.lr": 1, "model": "mlp"},
    ...     {"seed": 0, "client.lr": 0.1, "model": "cnn"}))
    >>> [len(group) for group in batches([one, far, two])]
    [2, 1]
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        fixed = {key: value for key, value in trial.values.items() if not _is_rate(key, value)}
        groups.setdefault(json.dumps(fixed, default=str), []).append(trial)
    return list(groups.values())


def _is_rate(key: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    name = key.rpartition(".")[2]
    return key == "seed" or name == "seed" or (number and (key.startswith("strategy.") or name in _RATES))


def check(words: Words, config_dir: Path | None) -> list[Config]:
    """Compose the first trial, and the first with each other value of each axis; return the configs.

    A wrong name, type or value is found before anything runs, at the cost of a sum, not of a product.

    Raises:
        UserError: in one line.

    """
    first = {axis.key: axis.texts[0] for axis in words.axes}
    middle = [f"{i.key}={_number(i.low, whole=i.whole)}" for i in words.intervals]

    def config(**changed: str) -> Config:
        swept = [f"{key}={text}" for key, text in {**first, **changed}.items()]
        return compose([*words.fixed, *swept, *middle], config_dir=config_dir)

    composed = [config()]
    for axis in words.axes:
        others = axis.texts[1:]
        composed += [config(**{axis.key: text}) for text in (others[-1:] if axis.is_range else others)]
    return composed


def _number(value: float, *, whole: bool) -> str:
    return str(int(value)) if whole else repr(value)


def save(plan: Plan, folder: Path) -> None:
    """Write the plan into the folder of a sweep."""
    with atomic(folder / FILE) as file:
        file.write(json.dumps(asdict(plan), indent=1, ensure_ascii=False).encode() + b"\n")


def load(folder: Path) -> Plan:
    """Read the plan of a sweep's folder.

    Raises:
        UserError: there is none, or it cannot be read.

    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        trials = tuple(Trial(**{**trial, "overrides": tuple(trial["overrides"])}) for trial in tree["trials"])
        parts = tuple(tree.get("parts", ()))
        return Plan(**{**tree, "words": tuple(tree["words"]), "trials": trials, "parts": parts})
    except FileNotFoundError as error:
        what = "is a run: fedsim run resume=…" if (folder / "plan.json").exists() else f"it has no {FILE}"
        raise UserError(f"{folder} is not the folder of a sweep; {what}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def claim_folder(wanted: str | None, kind: str) -> Path:
    """Make the folder of a new sweep and return it; a default name that is taken gets a number.

    Args:
        wanted: what the user said; None: `outputs/DATE/TIME-KIND`.
        kind: "sweep" or "tune".

    Raises:
        UserError: it cannot be made, or holds something already.

    """
    folder = Path(wanted) if wanted else Path("outputs", *time.strftime(f"%Y-%m-%d|%H-%M-%S-{kind}").split("|"))
    number, name = 1, folder.name
    while wanted is None and folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = [entry for entry in os.listdir(folder) if not entry.startswith(".")]
    except OSError as error:
        raise UserError(f"hydra.sweep.dir={folder} cannot be made: {error.strerror}") from error
    if held:
        raise UserError(
            f"hydra.sweep.dir={folder} is not empty (it holds {held[0]}); "
            f"choose another, or go on with fedsim {kind} resume={folder}"
        )
    return folder


def path(text: str | None) -> Path | None:
    """Return a saved `config_dir` as a path."""
    return None if text is None else Path(text)


def setting(key: str, value: str) -> str:
    r"""Return key=value as Hydra's grammar reads it, with quotes where it needs them.

    >>> setting("resume", "runs/a"), setting("resume", "it's")
    ('resume=runs/a', 'resume="it\'s"')
    """
    if re.fullmatch(r"[A-Za-z0-9._/-]+", value):
        return f"{key}={value}"
    return f'{key}="{value}"'.replace("\\", "\\\\") if '"' not in value else f"{key}='{value}'"
