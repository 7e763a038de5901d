"""The cache of decoded arrays: made once, never half there, made again when damaged."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.cache import cache_folder, cached

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    def __init__(self, array=ARRAY):
        self.array, self.calls = array, 0

    def __call__(self):
        self.calls += 1
        return self.array


def test_an_array_is_made_once_per_key(folder):
    maker = Maker()
    for _ in range(3):
        np.testing.assert_array_equal(cached("images", {"rows": 1}, maker), ARRAY)
    assert maker.calls == 1
    other = Maker(ARRAY[::-1])
    np.testing.assert_array_equal(cached("images", {"rows": 2}, other), ARRAY[::-1])
    np.testing.assert_array_equal(cached("images", {"rows": 2}, other), ARRAY[::-1])
    assert other.calls == 1
    assert len(list(folder.iterdir())) == 2  # and no temporary file is left


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _nonsense(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def _another_tensor(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"other": ARRAY}, path)


@pytest.mark.parametrize("damage", [_cut, _flip_a_bit, _empty, _nonsense, _another_tensor, os.remove])
def test_a_damaged_file_is_made_again(damage, folder):
    maker = Maker()
    cached("images", {}, maker)
    (path,) = folder.iterdir()
    damage(path)
    np.testing.assert_array_equal(cached("images", {}, maker), ARRAY)
    np.testing.assert_array_equal(cached("images", {}, maker), ARRAY)
    assert maker.calls == 2


def test_a_reader_never_sees_half_a_file_and_a_maker_that_fails_leaves_none(folder):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("images", {}, fail)
    assert not folder.exists() or not list(folder.iterdir())


HAMMER = """
import sys
import numpy as np
from fedsim.data.cache import cache_folder, cached
seed = int(sys.argv[1])
big = np.random.default_rng(0).integers(256, size=300_000, dtype=np.uint8)
for i in range(40):
    if i % 4 == seed:
        for path in cache_folder().glob("*.safetensors"):
            path.unlink(missing_ok=True)
    assert np.array_equal(cached("images", {"rows": 1}, lambda: big), big)
"""


def test_writers_at_the_same_time_do_not_disturb_each_other(folder):
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", HAMMER, str(seed)]) for seed in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert not list(folder.glob(".*"))


def test_a_cache_that_cannot_be_written_is_a_warning(folder, monkeypatch):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written .* set FEDSIM_CACHE"):
        np.testing.assert_array_equal(cached("images", {}, Maker()), ARRAY)


def test_a_full_disk_is_a_warning_and_leaves_nothing(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedsim.data.cache.save_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        np.testing.assert_array_equal(cached("images", {}, Maker()), ARRAY)
    assert not list(folder.iterdir())


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fedsim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fedsim"


def test_the_file_may_be_read_by_its_owner_only(folder):
    cached("images", {}, Maker())
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
