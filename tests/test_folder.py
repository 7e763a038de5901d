"""A run folder has one writer at a time."""

import os
import signal
import subprocess
import sys

import pytest

from fedsim.errors import UserError
from fedsim.folder import locked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="flock is POSIX's")

HOLDER = """
import sys
from pathlib import Path
from fedsim.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path until a line comes on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_refuses_and_says_who_writes(holder, tmp_path):
    for _ in range(2):  # a refusal leaves the lock and its owner's number as they were
        with (
            pytest.raises(UserError, match=rf"being written by another run \(process {holder.pid}\)"),
            locked(tmp_path),
        ):
            pass
    holder.communicate("\n")
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_killed_writer_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        pass


def test_the_same_process_refuses_too_and_another_folder_is_another_lock(tmp_path):
    folder = tmp_path / "new" / "run"
    with locked(folder), locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(folder):
        pass


def test_an_error_lets_go(tmp_path):
    with pytest.raises(RuntimeError, match="inside"), locked(tmp_path):
        raise RuntimeError("inside")
    with locked(tmp_path):
        pass
