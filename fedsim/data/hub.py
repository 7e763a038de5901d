"""The Hugging Face hub: asked where it can be reached, else what `datasets` has fetched before."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

_RETRIES = "huggingface_hub.utils._http"  # the logger of its "Retrying in 8s"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def load(name: str, config: str | None, split: str) -> Any:
    """Return a `datasets.Dataset`: of the hub, or from the cache of `datasets` where the hub's name is not known.

    Raises:
        ImportError: `datasets` is not installed.
        ConnectionError: there is no network, and the cache does not have it.
        Exception: whatever else `datasets` raises.

    """
    import datasets

    host = urlsplit(datasets.config.HF_ENDPOINT).hostname or ""
    if reachable(host):
        with _quiet(_RETRIES):
            return datasets.load_dataset(name, config, split=split)
    try:
        with _offline(), _quiet("datasets"):
            return datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise ConnectionError(f"no network: the name {host} is not known here") from error


def reachable(host: str) -> bool:
    """Say whether asking a host may succeed: its name is known, or a proxy or an offline setting decides it."""
    if {"http", "https", "all"} & getproxies_environment().keys() or any(os.environ.get(name) for name in _OFFLINE):
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` look into its cache alone, which otherwise asks the hub six times in 23 s first."""
    import datasets
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger speak of errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
