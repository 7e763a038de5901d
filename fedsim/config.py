"""The composed config of a run: Hydra's grammar and groups, with one clear line for every wrong input.

No part ever receives a config node: `instantiate` hands out plain Python values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fedsim import catalogue, composition, misfit
from fedsim.construct import build, construct
from fedsim.errors import UserError
from fedsim.settings import Checkpoint, EarlyStopping, Run

Config = DictConfig
"""A composed config, or a node of one."""

_FAULTS = (HydraException, OmegaConfBaseException, yaml.YAMLError)

SEEDED = ("partition", "model", "sampler", "attack", "devices")
"""Groups with a seed of their own."""


class Given(NamedTuple):
    """One override as the user wrote it, and as Hydra's grammar reads it."""

    text: str
    parsed: Override

    @property
    def key(self) -> str:
        """Dotted key or group, without sign and package."""
        return str(self.parsed.key_or_group)


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Config:
    """Compose a run's config from overrides such as `["strategy=fedld", "partition.alpha=0.1"]`.

    Args:
        overrides: in Hydra's grammar, without sweeps.
        config_dir: folder with further choices of groups, e.g. `DIR/strategy/mine.yaml`.

    Returns:
        The resolved config: shared scalars, one node a group, and a node `hydra` that holds `run.dir` (the run
        folder, see `claim_run_dir`), `runtime.choices` (group → choice), `runtime.config_dir` and `overrides.task`.

    Raises:
        UserError: one line that names the wrong group, key, type or value, what was expected and the nearest name.

    """
    folders = catalogue.roots(config_dir)
    known = {group: list(catalogue.options(group, folders)) for group in catalogue.groups(folders)}
    given = [parse(text) for text in overrides]
    _check_keys(given)
    for item in given:
        _check_choice(item, known)
    try:
        config = _compose(given, known, config_dir)
        OmegaConf.resolve(config)
    except _FAULTS as error:
        raise UserError(_diagnose(given, known, config_dir, error)) from None
    _check_names(config, known)
    _check_shadowed(config, config_dir)
    settings(config)
    return config


@cache  # a run reads each of its words three times, at milliseconds each
def parse(text: str) -> Given:
    """Read one override.

    Raises:
        UserError: it is not in Hydra's grammar, or gives several values.

    """
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(misfit.grammar(text)) from error
    given = Given(text, parsed)
    if not given.key.strip():
        raise UserError(misfit.grammar(text))
    if isinstance(parsed.value(), Sweep):
        hint = f"; a list is written {text.replace('=', '=[', 1)}]" if given.parsed.is_choice_sweep() else ""
        several = "" if given.key.split(".")[0] in ("sweep", "tune", "experiment") else "; `fedsim sweep` takes several"
        raise UserError(f"{text}: a run takes one value of {given.key}{several}{hint}")
    return given


def _check_keys(given: Sequence[Given]) -> None:
    seen: dict[str, str] = {}
    for item in given:
        key = "@".join(part for part in (item.key, item.parsed.package) if part)  # strategy and strategy@strategy.rule
        if key in seen:
            raise UserError(f"{key} is given twice: {seen[key]} and {item.text}")
        seen[key] = item.text
        if re.match(r"hydra\b", item.key) and item.key != "hydra.run.dir":
            raise UserError(f"{item.text}: of Hydra's own settings only hydra.run.dir, the run folder, can be set")


def _check_choice(item: Given, known: Mapping[str, Sequence[str]]) -> None:
    """Refuse a choice that a group does not have."""
    group, _, rest = item.key.partition("/")
    if group not in known or "." in item.key or item.parsed.type is OverrideType.DEL:
        return
    value = item.parsed.value()
    if rest:
        raise UserError(f"{item.text}: a choice in a folder is written {group}={rest}/{value}")
    if isinstance(value, dict):  # partition={alpha:0.1} sets keys
        return
    name = "" if value is None else str(value)
    if name not in known[group]:
        raise UserError(misfit.no_choice(group, name, known[group]))
    adds = item.parsed.type is not OverrideType.CHANGE
    if adds and group in catalogue.defaults():
        raise UserError(f"{group} has a choice already: write {group}={name}, without '+'")
    if not adds and group not in catalogue.defaults():
        raise UserError(f"{group} has no choice by default: write +{group}={name}")


def _compose(given: Sequence[Given], known: Mapping[str, Any], config_dir: Path | None) -> Config:
    """Compose with Hydra; keep of its own node what a run needs."""
    texts, choices = [item.text for item in given], [item for item in given if _is_choice(item, known)]
    values = [item for item in given if item not in choices]
    plain_values = (item.parsed.type is OverrideType.CHANGE and not item.parsed.package for item in values)
    if all(plain_values) and not any("${" in item.text for item in values):
        with suppress(*_FAULTS):  # Hydra itself says what is wrong
            config = composition.chosen([item.text for item in choices], config_dir)
            for item in values:
                OmegaConf.update(config, item.key, item.parsed.value(), merge=True)
            return _trimmed(config, texts, config_dir)
    return _trimmed(composition.fresh(texts, config_dir), texts, config_dir)


def _is_choice(item: Given, known: Mapping[str, Any]) -> bool:
    group = item.key.partition("/")[0]
    return group in known and item.parsed.type is not OverrideType.DEL and not isinstance(item.parsed.value(), dict)


def _trimmed(config: Config, overrides: Sequence[str], config_dir: Path | None) -> Config:
    """Keep of Hydra's node what a run needs."""
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


def _diagnose(given: Sequence[Given], known: Mapping[str, Any], config_dir: Path | None, error: Exception) -> str:
    """Say which override does not fit, by walking them over the config that the groups alone give."""
    choices = [item for item in given if item.key.partition("@")[0] in known]
    try:
        config = _compose(choices, known, config_dir)
    except _FAULTS as cause:
        return f"{' '.join(item.text for item in choices) or 'the default config'}: {_one_line(cause)}"
    tree = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    for item in given:
        message = item not in choices and misfit.override(item.text, item.key, tree, config.hydra.runtime.choices)
        if message:
            return message
    suspects = [item.text for item in given if "${" in item.text or isinstance(item.parsed.value(), dict)]
    where = " ".join(suspects) or next((key for key in tree if key != "hydra" and not _resolves(config, key)), None)
    return f"{where}: {_one_line(error)}" if where else _one_line(error)


def _resolves(config: Config, key: str) -> bool:
    try:
        plain(config[key])
    except OmegaConfBaseException:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def _check_names(config: Config, groups: Iterable[str]) -> None:
    """Refuse top-level names that nothing reads, and groups that were deleted."""
    known = {*groups, *Run.__dataclass_fields__}
    for name in config:
        if name not in known and name != "hydra":
            raise UserError(misfit.no_setting([], str(name), dict.fromkeys(known), {}))
    for group, choice in catalogue.defaults().items():
        if not isinstance(config.get(group), Config):
            chosen = config.hydra.runtime.choices.get(group)
            hint = f"choose one, for example {group}={choice}" if chosen is None else f"{chosen}.yaml holds no settings"
            raise UserError(f"{group} is missing; {hint}")
    run_dir = config.hydra.run.dir
    if not isinstance(run_dir, str) or not run_dir:
        raise UserError(f"hydra.run.dir must be a path, got {run_dir!r}")


def _check_shadowed(config: Config, config_dir: Path | None) -> None:
    """Refuse a file of the user's that Hydra passes over because fedsim has one of the same name."""
    if config_dir is None:
        return
    own = [catalogue.roots()[0]]
    for group, choice in config.hydra.runtime.choices.items():
        path = config_dir / group / f"{choice}.yaml"
        if path.is_file() and choice in catalogue.options(group, own):
            raise UserError(f"{group}={choice} is fedsim's own; rename {path} so that it can be chosen")


def settings(config: Config) -> Run:
    """Return the shared scalars, typed and checked.

    Raises:
        UserError: one of them is missing, of a wrong type or out of its range.

    """
    tree = {name: plain(config[name]) for name in Run.__dataclass_fields__ if name in config}
    for name, kind in (("early_stopping", EarlyStopping), ("checkpoint", Checkpoint)):
        if not isinstance(tree.get(name), dict):
            inner = ", ".join(f"{name}.{field}" for field in kind.__dataclass_fields__)
            raise UserError(f"{name} is a group of settings: {inner}")
        tree[name] = construct(kind, tree[name], name)
    for group in SEEDED:
        seed = OmegaConf.select(config, f"{group}.seed")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            what = "must be an integer >= 0 and below 2^63, or null for the run's seed"
            raise UserError(f"{group}.seed {what}, got {seed!r}")
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


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Return plain containers as a config that refuses new keys."""
    config = OmegaConf.create(dict(tree))
    OmegaConf.set_struct(config, True)
    return config


def notes(config: Config) -> list[str]:
    """Return what a user may not expect of a config: a method's pairing that an override undid."""
    choices, folders = config.hydra.runtime.choices, catalogue.roots(_config_dir(config))
    found = []
    for group, choice in choices.items():
        file = catalogue.options(group, folders).get(choice)
        listed = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", []) if file else []
        for entry, paired in (pair for item in listed if isinstance(item, dict) for pair in item.items()):
            other = re.fullmatch(r"override /?(\w+)(@.*)?", entry)
            used = choices.get(other[1]) if other else None
            if used is not None and used != paired and other:
                name = other[1]
                found.append(
                    f"{group}={choice} is paired with {name}={paired}; {name}={used} was asked for and is used"
                )
    return found


def _config_dir(config: Config) -> Path | None:
    path = config.hydra.runtime.config_dir
    return None if path is None else Path(path)


def to_yaml(config: Config, *, provenance: bool = False) -> str:
    """Return a config as YAML, in the order it was composed.

    Args:
        config: a composed config.
        provenance: keep the node `hydra` (choices and overrides), from which `load` and `amend` go on.

    """
    choices = config.hydra.runtime.choices
    order = [*catalogue.defaults(), *(group for group in choices if group not in catalogue.defaults())]
    head = " ".join(f"{group}={choices[group]}" for group in order if group in choices)
    kept = config if provenance else OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    return f"# {head}\n{OmegaConf.to_yaml(kept)}"
