"""The user's own rows of the engine table: what `fedsim bench --save` found on this machine.

One JSON file a user, `engines.json` in `$XDG_CONFIG_HOME/fedsim` or `~/.config/fedsim`: situation → what won there.
A run reads it and never writes it, so the same file and config always get the same engine; the plan says so.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedsim.engine.task import Task
from fedsim.errors import UserError
from fedsim.files import atomic


class Winner(NamedTuple):
    """The engine that a situation's rounds were fastest with."""

    arguments: dict[str, Any]  # of the config group `engine`, `name` among them
    measured: str  # date, YYYY-MM-DD


def path() -> Path:
    """Return the user's file, there or not."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "fedsim" / "engines.json"


def situation(task: Task, cohort: int, threads: int) -> str:
    """Return what the choice of an engine hangs on, as one line: model, shapes, local training, cohort, machine.

    Cohorts are told apart by powers of two: 9 to 16 clients are one situation.
    """
    module, training = task.module, task.training
    kinds = Counter(type(m).__name__ for m in module.modules() if next(m.parameters(recurse=False), None) is not None)
    layers = "+".join(f"{count}×{name}" for name, count in sorted(kinds.items()))
    steps = f"{training.local_steps} steps" if training.local_steps else f"{training.local_epochs} epochs"
    dtype = task.precision if task.precision != "fp32" else str(task.dtype).removeprefix("torch.")
    most = 1 << (cohort - 1).bit_length()
    cpu = task.device.type != "cuda"
    machine = f"{task.device.type}, {threads} threads" if cpu else torch.cuda.get_device_name(task.device)
    return (
        f"{layers}, {task.shared.size + task.local.size} parameters, input {tuple(task.x.shape[1:])}, "
        f"{type(task.objective).__name__}, {training.optimizer} momentum {training.momentum:g}, "
        f"batch {training.batch_size}, {steps}, cohort {most // 2 + 1}–{most}, {dtype}, {machine}"
    )


def find(key: str) -> Winner | None:
    """Return the user's row of a situation, None where there is none.

    Raises:
        UserError: the file is there and cannot be read.

    """
    row = _read().get(key)
    if row is None:
        return None
    try:
        arguments = dict(row["engine"])
        return Winner({"name": str(arguments.pop("name")), **arguments}, str(row["measured"]))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path()}: the row {key!r} is not one that fedsim bench writes; delete it") from error


def save(key: str, winner: Winner, figures: dict[str, Any]) -> Path:
    """Write a situation's row in place of an older one; return the file.

    Args:
        key: the situation.
        winner: what is taken there.
        figures: what was measured, for whoever reads the file.

    """
    rows = _read() | {key: {"engine": winner.arguments, "measured": winner.measured, **figures}}
    with atomic(path()) as file:
        file.write((json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode())
    return path()


def _read() -> dict[str, Any]:
    try:
        rows = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path()}: not readable ({error}); delete it, or write it anew by fedsim bench") from error
    if not isinstance(rows, dict):
        raise UserError(f"{path()}: not a table of engines; delete it")
    return rows
