"""The composed config of a run: Hydra's grammar and groups, with one clear line for every wrong input.

No part ever receives a config node: `instantiate` hands out plain Python values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedsim import catalogue
from fedsim.construct import build, construct
from fedsim.errors import UserError, did_you_mean
from fedsim.settings import Checkpoint, EarlyStopping, Run

_ADD = (OverrideType.ADD, OverrideType.FORCE_ADD)


class Given(NamedTuple):
    """One override as the user wrote it, and as Hydra's grammar reads it."""

    text: str
    parsed: Override

    @property
    def key(self) -> str:
        """Dotted key or group, without sign and package."""
        return str(self.parsed.key_or_group)


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> DictConfig:
    """Compose a run's config from overrides such as `["strategy=fedld", "partition.alpha=0.1"]`.

    Args:
        overrides: in Hydra's grammar, without sweeps.
        config_dir: folder with further choices of groups, e.g. `DIR/strategy/mine.yaml`.

    Returns:
        The resolved config: shared scalars, one node a group, and a node `hydra` that holds `run.dir` (the run
        folder), `runtime.choices` (group → choice), `runtime.config_dir` and `overrides.task` (as given).

    Raises:
        UserError: one line that names the wrong group, key, type or value, what was expected and the nearest name.

    """
    folders = catalogue.roots(config_dir)
    given = [parse(text) for text in overrides]
    _check_keys(given)
    for item in given:
        _check_group(item, folders)
    try:
        config = _compose([item.text for item in given], config_dir)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_diagnose(given, folders, config_dir, error)) from error
    _check_names(config, folders)
    settings(config)
    return config


def parse(text: str) -> Given:
    """Read one override.

    Raises:
        UserError: it is not in Hydra's grammar, or gives several values.

    """
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(_grammar(text)) from error
    key = str(parsed.key_or_group)
    if not key.strip():
        raise UserError(f"{text!r} names no setting; write name=value")
    if isinstance(parsed.value(), Sweep):
        value = text.partition("=")[2]
        raise UserError(f"{text}: one run takes one value of {key}; a list is written {key}='[{value}]'")
    return Given(text, parsed)


def _grammar(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        groups = [g for g in catalogue.defaults() if text in catalogue.options(g, catalogue.roots())]
        hint = f"; did you mean {groups[0]}={text}?" if groups else "; write name=value, for example seed=1"
        return f"{text!r} sets nothing{hint}"
    if not key or not all(c.isalnum() or c in "_-./@+~:$" for c in key) or ".." in key or key[0] == ".":
        return f"{text!r}: {key!r} is not the name of a setting; write name=value, for example seed=1"
    if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
        return f"{text!r}: a bracket is not closed"
    if value.count("'") % 2 or value.count('"') % 2:
        return f"{text!r}: a quotation mark is not closed"
    return f"{text!r}: cannot read the value; put it in quotes that the shell keeps: {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    """Return key=value with what quotes both Hydra's grammar and a POSIX shell need."""
    if value and all(c.isascii() and (c.isalnum() or c in "/._-") for c in value):
        return f"{key}={value}"
    inner = value.replace("\\", "\\\\").replace('"', '\\"')
    return "'" + f'{key}="{inner}"'.replace("'", "'\\''") + "'"


def _check_keys(given: Sequence[Given]) -> None:
    seen: dict[str, str] = {}
    for item in given:
        if item.key in seen:
            raise UserError(f"{item.key} is given twice: {seen[item.key]} and {item.text}")
        seen[item.key] = item.text
        if item.key.split(".")[0].split("/")[0] == "hydra" and item.key != "hydra.run.dir":
            raise UserError(f"{item.text}: of Hydra's own settings only hydra.run.dir, the run folder, can be set")


def _check_group(item: Given, folders: Sequence[Traversable]) -> None:
    """Refuse a choice that a group does not have."""
    groups = catalogue.groups(folders)
    group, _, rest = item.key.partition("/")
    if group not in groups or "." in item.key or item.parsed.type is OverrideType.DEL:
        return
    if rest:
        raise UserError(f"{item.text}: a choice in a folder is written {group}={rest}/{item.parsed.value()}")
    if isinstance(item.parsed.value(), dict):
        return
    name, known = str(item.parsed.value()), catalogue.options(group, folders)
    if item.parsed.value() is None or not name:
        raise UserError(f"{item.text}: {group} needs a name{_suggest('', known, group)}")
    if name not in known:
        raise UserError(f"no {group} {name!r}{_suggest(name, known, group)}")
    if item.parsed.type in _ADD and group in catalogue.defaults():
        raise UserError(f"{group} has a choice already: write {group}={name}, without '+'")
    if item.parsed.type not in _ADD and group not in catalogue.defaults():
        raise UserError(f"{group} has no choice by default: write +{group}={name}")
    same = [folder for folder in folders if folder.joinpath(group, f"{name}.yaml").is_file()]
    if len(same) > 1:
        raise UserError(f"{group}={name} is fedsim's own; rename {same[-1]}/{group}/{name}.yaml")


def _suggest(name: str, known: Iterable[str], group: str) -> str:
    known = list(known)
    inside = [option for option in known if name and option.startswith(name + "/")]
    if inside:
        return f"; did you mean {inside[0]!r}? (it is a folder of {len(inside)} choices)"
    hint = did_you_mean(name.lower(), known)
    if hint.startswith("; did") or len(known) <= 12:
        return hint
    return f"; `fedsim list {group}` shows all {len(known)}"


def _compose(overrides: Sequence[str], config_dir: Path | None) -> DictConfig:
    """Compose with Hydra; keep of its own node what a run needs."""
    extra = [] if config_dir is None else [f"hydra.searchpath=['file://{_escape(str(config_dir.resolve()))}']"]
    with initialize_config_module("fedsim.configs", version_base="1.3"):
        config = hydra_compose("config", [*overrides, *extra], return_hydra_config=True)
    node = config.hydra
    chosen = {str(k): v for k, v in node.runtime.choices.items() if not str(k).startswith("hydra/")}
    if not any(text.startswith("hydra.run.dir=") for text in overrides):
        with open_dict(node):  # the choice "flower/krum" must not open a folder of its own
            node.runtime.choices.strategy = str(chosen.get("strategy")).replace("/", "-")
    with open_dict(config):
        config.hydra = {
            "run": {"dir": node.run.dir},
            "runtime": {"choices": chosen, "config_dir": None if config_dir is None else str(config_dir)},
            "overrides": {"task": list(overrides)},
        }
    return config


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace("'", "\\'")


def _diagnose(given: Sequence[Given], folders: Sequence[Traversable], config_dir: Path | None, error: Exception) -> str:
    """Say which override does not fit, by walking them over the config that the groups alone give."""
    groups = catalogue.groups(folders)
    choices = [item for item in given if item.key.partition("@")[0] in groups and "." not in item.key]
    try:
        config = _compose([item.text for item in choices], config_dir)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as cause:
        return f"{' '.join(item.text for item in choices) or 'the default config'}: {_one_line(cause)}"
    for item in given:
        if item in choices:
            continue
        message = _misfit(item, config, groups)
        if message:
            return message
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def _misfit(item: Given, config: DictConfig, groups: Sequence[str]) -> str | None:
    """Return what is wrong with one value override, None if it fits."""
    parts = item.key.split(".")
    node: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return f"{item.text}: {'.'.join(parts[:depth])} is a value, {node!r}, not a group of settings"
        names = [str(name) for name in node if name != "hydra"]
        last = depth == len(parts) - 1
        if part not in node:
            if item.parsed.type in _ADD and (last or depth):
                return None
            return _no_such(item, parts[:depth], part, names, config)
        node = node._get_node(part) if last else node[part]
    if item.parsed.type is OverrideType.ADD:
        return f"{item.key} exists already: write it without '+'"
    return None


def _no_such(item: Given, parents: list[str], name: str, names: list[str], config: DictConfig) -> str:
    hint = did_you_mean(name, names)
    if not parents:
        deeper = [path for path in _paths(config) if path.rpartition(".")[2] == name]
        if deeper:
            hint = f"; did you mean {' or '.join(map(repr, deeper[:3]))}?"
        elif not hint.startswith("; did"):
            hint = "; `fedsim config` shows all"
        return f"no setting or group {name!r}{hint}"
    group = parents[0]
    choice = config.hydra.runtime.choices.get(group)
    owner = ".".join(parents) if len(parents) > 1 or choice is None else f"{group}={choice}"
    return f"{owner} has no setting {name!r}{hint}"


def _paths(config: DictConfig) -> list[str]:
    groups = {str(name): node for name, node in config.items() if isinstance(node, DictConfig) and name != "hydra"}
    return [f"{group}.{name!s}" for group, node in groups.items() for name in node]


def _check_names(config: DictConfig, folders: Sequence[Traversable]) -> None:
    """Refuse top-level names that nothing reads, and groups that were deleted."""
    known = {*catalogue.groups(folders), *Run.__dataclass_fields__, "hydra"}
    for name in config:
        if name not in known:
            raise UserError(f"no setting or group {str(name)!r}{did_you_mean(str(name), known - {'hydra'})}")
    for group in catalogue.defaults():
        if not isinstance(config.get(group), DictConfig):
            raise UserError(f"{group} is missing; choose one: {group}={catalogue.defaults()[group]}")
    run_dir = config.hydra.run.dir
    if not isinstance(run_dir, str) or not run_dir:
        raise UserError(f"hydra.run.dir must be a path, got {run_dir!r}")


def settings(config: DictConfig) -> Run:
    """Return the shared scalars, typed and checked.

    Raises:
        UserError: one of them is missing, of a wrong type or out of its range.

    """
    tree = {name: plain(config.get(name)) for name in Run.__dataclass_fields__ if name in config}
    for name, kind in (("early_stopping", EarlyStopping), ("checkpoint", Checkpoint)):
        if not isinstance(tree.get(name), dict):
            raise UserError(f"{name} must be a group of settings, like {name}.{next(iter(kind.__dataclass_fields__))}")
        tree[name] = construct(kind, tree[name], name)
    return cast(Run, construct(Run, tree))


def plain(node: Any) -> Any:
    """Return a config node as plain Python containers and values."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def instantiate(node: Any, key: str | None = None, **extra: Any) -> Any:
    """Build what a node names by `_target_`, from plain Python values.

    Args:
        node: a config node, or plain containers; a null `_target_` gives None.
        key: where the node stands, for messages; a config node knows it by itself.
        extra: further arguments of the outermost call, passed as they are.

    Raises:
        UserError: no such target, a wrong argument, or the target refused its arguments.

    """
    if key is None:
        key = str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""
    return build(plain(node), key, extra)
