"""The names of Flower that are not public, one test each, so that a new version says which of them broke."""

import ast
import gc
import importlib.resources
import itertools
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedsim.flower import runtime

PACKAGE = Path(runtime.__file__).parents[1]


@pytest.fixture(autouse=True)
def _identity():
    runtime.claim_identity()


def message():
    return Message(RecordDict(), 7, "train")


def test_task_identity_lets_messages_be_built_and_is_never_overwritten():
    from flwr.supercore.task_identity import TaskIdentity

    assert message().metadata.src_node_id == runtime.SERVER_NODE_ID
    TaskIdentity.node_id = 99  # a Flower launcher's
    try:
        runtime.claim_identity()
        assert message().metadata.src_node_id == 99
    finally:
        TaskIdentity.node_id = runtime.SERVER_NODE_ID


def test_a_users_script_that_imports_flower_first_is_quiet_too():
    program = (
        "from flwr.serverapp.strategy import FedAvg\n"
        "from fedsim.flower import runtime\n"
        "runtime.claim_identity()\n"
        "FedAvg().summary()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR")}
    for level, quiet in ((None, True), ("INFO", False)):
        asked = environment | ({"FLWR_LOG_LEVEL": level} if level else {})
        done = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=True)
        assert ("Sampling" not in done.stderr) == quiet


def test_a_message_takes_an_id_and_its_reply_names_it():
    request = message()
    runtime.set_message_id(request, "41")
    assert request.metadata.message_id == "41"
    assert Message(RecordDict(), reply_to=request).metadata.reply_to_message_id == "41"


def test_a_message_with_another_content_keeps_its_metadata():
    request, content = message(), RecordDict({"arrays": ArrayRecord()})
    copy = runtime.with_content(request, content)
    assert copy.metadata is request.metadata
    assert copy.content is content
    assert len(request.content) == 0


def test_an_empty_run_can_be_built():
    assert runtime.empty_run().run_id == runtime.RUN_ID


def test_constants_are_what_flowers_mods_and_wrappers_use():
    assert (runtime.CLIPPING_NORM, runtime.NORM_BIT) == ("clipping_norm", "norm_bit")
    assert isinstance(runtime.CLIENT_RAISED, int)


def test_flowers_log_is_collected_though_nothing_is_printed(capsys):
    from flwr.supercore import log

    with runtime.logged_warnings() as lines:
        log(logging.INFO, "chatter")
        log(logging.WARNING, "needs %d replies", 7)
    log(logging.WARNING, "after")
    assert lines == ["needs 7 replies"]
    assert capsys.readouterr() == ("", "")


def test_arrays_are_taken_out_without_a_collection(monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "collect", lambda *_: calls.append(1) or 0)

    def take():
        return ArrayRecord({"a": Array(np.ones(3))}).to_numpy_ndarrays(keep_input=False)

    take()
    assert len(calls) == 1, "Flower no longer forces a collection here: no_forced_collection can go"
    with runtime.no_forced_collection():
        np.testing.assert_array_equal(take()[0], np.ones(3))
    assert len(calls) == 1
    take()
    assert len(calls) == 2


def draws():
    return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002


def test_seeding_repeats_by_key_and_gives_the_generators_back_even_after_an_error():
    with runtime.seeded(0, "a", 1, 2):
        first = draws()
    with runtime.seeded(0, "a", 1, 2):
        assert draws() == first
    for other in ((1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 2), (0, "a", 1, 3)):
        with runtime.seeded(*other):
            assert not set(draws()) & set(first)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with pytest.raises(ZeroDivisionError), runtime.seeded(0, "a"):
        _ = draws()[0] / 0
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_flower_is_imported_by_this_package_only_and_its_private_names_by_one_file():
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    folders = [importlib.resources.files(f"fedsim.{name}") for name in ("strategies", "clients")]
    for path in itertools.chain.from_iterable(Path(str(folder)).rglob("*.py") for folder in (PACKAGE, *folders)):
        found = {name for name in imports(path) if name.split(".")[0] == "flwr"}
        assert not found or path.parent.name == "flower", f"{path} imports {found}"
        if path.name != "runtime.py":
            assert found <= public, f"{path} imports {found - public}"


def test_importing_is_quiet_and_asks_for_no_network():
    program = (
        "import os, fedsim.flower.grid; "
        "print(*(os.environ[n] for n in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK', 'FLWR_LOG_LEVEL')))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "ERROR"]
    assert done.stderr == ""
