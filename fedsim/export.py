"""`fedsim export flower`: a run as a Flower app that `flwr run` starts, with the run's own strategy and clients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim import __version__
from fedsim.build import build
from fedsim.config import Config, compose, parse, plain
from fedsim.errors import UserError, did_you_mean
from fedsim.experiment import Experiment
from fedsim.export_templates import APP, PYPROJECT, README
from fedsim.metrics.records import write_json
from fedsim.saved import load
from fedsim.scaffold.package import filled

KINDS = ("flower",)


def export(words: Sequence[str], config_dir: Path | None = None) -> list[Path]:
    """Write an app and return its files.

    Args:
        words: "flower", the folder to make, then `run=FOLDER` or the settings of a run.
        config_dir: folder of further choices, for settings.

    Raises:
        UserError: something is wrong in what was asked, or the run has no counterpart in a deployment.

    """
    if len(words) < 2 or words[0] not in KINDS:
        hint = did_you_mean(words[0], KINDS) if words else ""
        raise UserError(f"fedsim export needs what and where: fedsim export flower my_app run=FOLDER{hint}")
    folder, config = Path(words[1]), _config(words[2:], config_dir)
    if "=" in words[1]:
        raise UserError(
            f"fedsim export flower needs a folder before {words[1]}: fedsim export flower my_app {words[1]}"
        )
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder} exists already; choose another folder")
    experiment = build(config)
    _check(experiment, config)
    return _write(folder, experiment, config)


def _config(words: Sequence[str], config_dir: Path | None) -> Config:
    runs = [word for word in words if parse(word).key == "run"]
    if not runs:
        return compose(words, config_dir=config_dir)
    if len(words) > 1 or config_dir is not None:
        raise UserError("run=FOLDER says everything; give settings without it")
    config = load(Path(str(parse(runs[0]).parsed.value())))
    if parts := config.hydra.get("parts"):
        raise UserError(
            f"{runs[0]}: the run was started from Python with objects for {', '.join(parts)}; "
            "a node can build only what a config names by _target_"
        )
    return config


def _check(experiment: Experiment, config: Config) -> None:
    """Refuse what exists in a simulation alone."""
    strategy, chosen = experiment.strategy, config.hydra.runtime.choices
    found = {
        f"attack={chosen.attack}": chosen.attack != "none",
        f"compressor={chosen.compressor}": chosen.compressor != "none",
        f"mode={chosen.mode}": chosen.mode != "sync",
        f"client={chosen.client}": experiment.foreign is not None,
        f"strategy={chosen.strategy}": bool(
            getattr(strategy, "pooled", False) or {"mimic"} & set(getattr(strategy, "needs", ()))
        ),
    }
    if bad := next((what for what, holds in found.items() if holds), None):
        why = "it is a Flower app already" if bad.startswith("client=") else "it needs what only a simulation has"
        raise UserError(f"{bad} cannot be exported: {why}")
    if not callable(strategy) and experiment.task.buffers.size and experiment.settings.buffers == "average":
        raise UserError(
            f"strategy={chosen.strategy} and a model with running statistics: Flower's strategies get parameters "
            "alone; set buffers=client, or take a rule of fedsim's, such as strategy=fedavg"
        )


def _write(folder: Path, experiment: Experiment, config: Config) -> list[Path]:
    name = re.sub(r"\W+", "_", folder.resolve().name.lower()).strip("_").lstrip("0123456789_") or "app"
    values = {
        "name": name, "project": name.replace("_", "-"), "version": __version__,
        "clients": len(experiment.participants),
        "rounds": experiment.settings.num_rounds, "fraction": experiment.settings.fraction,
        "choices": " ".join(f"{key}={config.hydra.runtime.choices[key]}" for key in ("strategy", "client", "data")),
    }  # fmt: skip
    texts = {"pyproject.toml": PYPROJECT, "README.md": README, "<name>/__init__.py": '"""A run of fedsim."""\n',
             "<name>/app.py": APP}  # fmt: skip
    fill = {key: str(value) for key, value in values.items()}
    made = []
    for path, text in texts.items():
        target = folder / filled(path, fill)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(filled(text, fill), encoding="utf-8")
        made.append(target)
    made.append(folder / name / "run.json")
    write_json(made[-1], _run(experiment, config))
    return made


def _run(experiment: Experiment, config: Config) -> dict[str, Any]:
    """Return what server and nodes build the run from."""
    tree = plain(config)
    tree["hydra"] = {"runtime": {"choices": tree["hydra"]["runtime"]["choices"]}}
    tree["tracker"] = {"_target_": None}
    tree["data"] = {key: _absolute(value) if key in ("root", "path") else value for key, value in tree["data"].items()}
    x = experiment.dataset.x
    return {
        "config": tree,
        "clients": experiment.participants.tolist(),
        "input_shape": list(x.shape[1:]),
        "num_classes": experiment.dataset.num_classes,
        "tokens": not x.is_floating_point(),
    }


def _absolute(path: str | None) -> str | None:
    """Return a path that a process elsewhere on this machine finds."""
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path
