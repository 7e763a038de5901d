"""The hub is asked only where its name is known; else what was fetched before is read, or the error comes at once."""

from __future__ import annotations

import logging
import socket

import pytest

from fedsim.data import hub
from fedsim.data.tables import open_split
from fedsim.errors import UserError

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'fedsim[data]'")
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """Know no names; with `asked`, whether each load was offline."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


def test_without_network_the_cache_alone_is_asked(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: (split, datasets.config.HF_HUB_OFFLINE))
    assert hub.load("someone/thing", None, "train") == ("train", True)
    assert not datasets.config.HF_HUB_OFFLINE  # as it was


def test_without_network_the_error_names_the_host_and_the_folders(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.thing.*no network: the name huggingface.co is not known here"):
        open_split("someone/thing", None, "train", None)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_proxy_or_an_offline_setting_decides_instead(monkeypatch, variable):
    assert not hub.reachable("huggingface.co")
    monkeypatch.setenv(variable, "1")
    assert hub.reachable("huggingface.co")


def test_the_hub_retries_without_a_word(monkeypatch, caplog):
    def load_dataset(*_, split):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        return split, datasets.config.HF_HUB_OFFLINE

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert hub.load("someone/thing", None, "train") == ("train", False)
    assert not caplog.records
