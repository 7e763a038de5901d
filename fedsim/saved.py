"""A config on disk: the folder a run writes to, and the config that a resumed run goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from fedsim.config import Config, compose, from_tree, parse, plain
from fedsim.errors import UserError

RESUMABLE = ("num_rounds", "engine.workers", "engine.devices", "engine.address", "client_state_bytes", "tracker")
"""What may be set anew when a run is resumed: nothing that decides its numbers but how far it goes."""


def has_fixed_folder(config: Config) -> bool:
    """Say whether the user named the run folder."""
    return any(text.startswith("hydra.run.dir=") for text in config.hydra.overrides.task)


def claim_run_dir(config: Config) -> Path:
    """Make the run folder and return it; a default name that is taken gets -2, -3, … and the config is told.

    Raises:
        UserError: the folder cannot be made.

    """
    wanted = Path(config.hydra.run.dir)
    fixed = has_fixed_folder(config)
    path, number = wanted, 1
    while True:
        try:
            path.mkdir(parents=True, exist_ok=fixed)
        except OSError as error:
            if isinstance(error, FileExistsError) and not fixed:
                number += 1
                path = wanted.with_name(f"{wanted.name}-{number}")
                continue
            raise UserError(f"hydra.run.dir={path} cannot be made: {error.strerror}") from error
        config.hydra.run.dir = str(path)
        return path


def load(folder: Path) -> Config:
    """Read the config of a run folder, as `to_yaml(config, provenance=True)` wrote it.

    Raises:
        UserError: there is none, or it is not one of fedsim's.

    """
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        is_sweep = (folder / "trials.json").exists()
        what = f"it is a sweep's: fedsim sweep resume={folder}" if is_sweep else "it has no config.yaml"
        raise UserError(f"{folder} is not a run folder: {what}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        tree["hydra"]["run"] = {"dir": str(folder)}
        tree["hydra"]["overrides"]["task"], tree["hydra"]["runtime"]["choices"]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is not the config of a run: it does not say what was chosen") from error
    return from_tree(tree)


def check_config_dir(folder: Path, config_dir: Path | None) -> None:
    """Refuse a folder of choices that is not the one that a run was started with; that one changes nothing.

    Raises:
        UserError: it is another one.

    """
    said = None if config_dir is None else load(folder).hydra.runtime.config_dir
    if config_dir is not None and (said is None or Path(said).resolve() != config_dir.resolve()):
        was = "without one" if said is None else f"with {said}"
        raise UserError(f"--config-dir {config_dir}: the run was started {was}, and a resumed run keeps its config")


def run_dir_named(config: Config, name: str) -> None:
    """Let a run folder whose name is left to fedsim end with what is run, in place of the config's strategy."""
    if not has_fixed_folder(config):
        folder = Path(config.hydra.run.dir)
        chosen = str(config.hydra.runtime.choices.strategy).replace("/", "-")
        config.hydra.run.dir = str(folder.with_name(folder.name.removesuffix(chosen) + name.replace("/", "-")))


def amend(saved: Config, overrides: Sequence[str], allowed: Sequence[str] = RESUMABLE) -> Config:
    """Return a saved config with further overrides, of which only some keys may change anything.

    An override that asks for what is saved anyway is no change, and a default that another version of fedsim
    changed since does not count: what is compared is the config composed with and without the overrides.

    Args:
        saved: from `load`.
        overrides: in Hydra's grammar.
        allowed: keys, or groups of keys, that may change.

    Raises:
        UserError: the keys that would change, with both values.

    """
    if not overrides:
        return saved
    keys = {parse(text).key for text in overrides}
    before_task = list(saved.hydra.overrides.task)
    after_task = [*(text for text in before_task if parse(text).key not in keys), *overrides]
    folder = saved.hydra.runtime.config_dir
    config_dir = None if folder is None else Path(folder)
    old, new = (compose(task, config_dir=config_dir) for task in (before_task, after_task))
    before, after, stored = _flat(plain(old)), _flat(plain(new)), _flat(plain(saved))
    changed = {k for k in before.keys() | after.keys() if k not in before or k not in after or before[k] != after[k]}
    changed = {k for k in changed if k not in stored or k not in after or stored[k] != after[k]}
    refused = sorted(k for k in changed if not any(k == a or k.startswith(f"{a}.") for a in allowed))
    if "hydra.run.dir" in keys:
        raise UserError("a resumed run goes on in its own folder: leave hydra.run.dir out")
    if refused:
        chosen, asked = saved.hydra.runtime.choices, new.hydra.runtime.choices
        groups = [name for name in asked if chosen.get(name) != asked[name]]
        pairs = [f"{name}={chosen.get(name)}, asked {asked[name]}" for name in groups]
        single = [k for k in refused if k.split(".")[0] not in groups]
        pairs += [f"{k}={stored.get(k)}, asked {after.get(k)}" for k in single]
        raise UserError(f"a resumed run keeps its config but for {', '.join(allowed)}; differs: {'; '.join(pairs)}")
    tree = cast(dict[str, Any], plain(saved))
    for name in allowed:
        if any(k == name or k.startswith(f"{name}.") for k in changed):
            _replace(tree, name.split("."), plain(new))
    return from_tree(tree)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value, without the node `hydra`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found if prefix else {k: v for k, v in found.items() if not k.startswith("hydra.")}


def _replace(tree: dict[str, Any], path: Sequence[str], source: Mapping[str, Any]) -> None:
    for name in path[:-1]:
        tree, source = tree[name], source[name]
    tree[path[-1]] = source[path[-1]]
