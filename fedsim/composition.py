"""What Hydra composes from chosen YAML files, kept: runs of one process differ in values more often than in choices."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from fedsim import catalogue, plugins

_MOST = 64  # compositions kept, each some hundred kB
# Of Hydra's own groups, which it would read and compose beside fedsim's: a fifth of the time.
_UNUSED = [
    f"~hydra/{group}"
    for group in ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging", "env")
]


def fresh(overrides: Sequence[str], config_dir: Path | None) -> DictConfig:
    """Compose with Hydra; of the node `hydra`, what its launchers, sweepers and loggers are told is left out."""
    with initialize_config_module("fedsim.configs", version_base="1.3"):
        return compose("config", [*overrides, *_UNUSED, *plugins.search_path(config_dir)], return_hydra_config=True)


def chosen(choices: Sequence[str], config_dir: Path | None) -> DictConfig:
    """Return what Hydra composes from choices of groups alone, a copy of one's own; files that changed are read again.

    Of the node `hydra` only `run.dir`, not resolved, and `runtime.choices` are kept.

    Args:
        choices: such as "strategy=fedld"; their values are files, so that values of settings are no part of them.
        config_dir: folder of further choices.

    """
    stamps = hash(tuple(stamp for root in catalogue.roots(config_dir) for stamp in _stamps(root)))
    key = (tuple(choices), config_dir, tuple(plugins.search_path(config_dir)), stamps)
    if key not in _kept:
        while len(_kept) >= _MOST:
            del _kept[next(iter(_kept))]
        config = fresh(choices, config_dir)
        node = OmegaConf.to_container(config.hydra.run, resolve=False)
        with open_dict(config):
            config.hydra = {"run": node, "runtime": {"choices": dict(config.hydra.runtime.choices)}}
        OmegaConf.clear_cache(config)  # the time of day is one of the things that it holds
        _kept[key] = config
    return copy.deepcopy(_kept[key])


_kept: dict[object, DictConfig] = {}


def _stamps(folder: object) -> Iterator[tuple[str, int, int]]:
    """Yield path, time of change and size of each file below a folder."""
    if isinstance(folder, Path | str):  # what is in an archive does not change
        for entry in os.scandir(folder):
            if entry.is_dir():
                yield from _stamps(entry.path)
            else:
                found = entry.stat()
                yield entry.path, found.st_mtime_ns, found.st_size
