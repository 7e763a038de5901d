"""Checkpoints: what is read is what was written, and only whole ones are read."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from fedsim import checkpoint
from fedsim.errors import UserError


def nested():
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "weights": torch.tensor([1.5, -0.0, math.nan, math.inf, -math.inf, 5e-324], dtype=torch.float64),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "view": base[:, 1],  # not contiguous, in shared storage
        "same": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "rule": {"velocity": base[0], "count": 3, "rate": 0.1, "name": "adam", "none": None, "flag": True},
        "numbers": [math.nan, math.inf, -math.inf, -0.0, 0.1, 2**62, -1],
        "array": np.array([[1, 2], [3, 4]], dtype=np.int64),
        "strided": np.arange(10.0)[::3],
        "bools": np.array([True, False]),
        "big": np.uint64(2**64 - 1),
        "list": [{"a": torch.ones(2)}, [], {}, "text", [1, [2, [None]]]],
        "": {"tensor": 1, "dict": {"list": "float"}},  # names that the file format itself uses
    }


def same(a, b):
    """Whether two states are equal to the bit, types included."""
    if isinstance(a, torch.Tensor):
        bits = a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.generic):
        a = a.item()
    return type(a) is type(b) and repr(a) == repr(b)  # repr tells NaN, −0.0 and 0.0 apart


def test_a_nested_state_comes_back_to_the_bit(tmp_path):
    checkpoint.save(tmp_path, 4, nested())
    round, state = checkpoint.load(tmp_path)
    assert round == 4
    assert same(nested(), state)
    assert not same({**nested(), "scalar": torch.tensor(8)}, state)


@pytest.mark.parametrize("length", range(1, 6))
def test_products_with_what_comes_back_have_the_same_bits(length, tmp_path):
    before = {"moves": torch.zeros(length), "held": torch.randn(15010, generator=torch.Generator().manual_seed(length))}
    checkpoint.save(tmp_path, 1, before)
    after = checkpoint.load(tmp_path)[1]
    other = torch.randn(7, 15010, generator=torch.Generator().manual_seed(0))
    assert after["held"].data_ptr() % 64 == 0
    assert torch.equal(other @ after["held"], other @ before["held"])
    assert torch.equal(other[0] @ after["held"], other[0] @ before["held"])


def test_the_manifest_is_strict_json(tmp_path):
    """Anybody's reader takes it: NaN and the infinities, which JSON does not have, are not written bare."""
    checkpoint.save(tmp_path, 1, nested())

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    manifest = json.loads((tmp_path / "round-00000001.json").read_text(), parse_constant=refuse)
    assert manifest["round"] == 1


def test_what_is_read_is_not_what_is_held(tmp_path):
    weights = torch.zeros(3)
    checkpoint.save(tmp_path, 1, {"weights": weights})
    weights += 1
    assert checkpoint.load(tmp_path)[1]["weights"].tolist() == [0, 0, 0]
    first, second = checkpoint.load(tmp_path)[1], checkpoint.load(tmp_path)[1]
    first["weights"] += 1
    assert second["weights"].tolist() == [0, 0, 0]


def test_the_newest_are_kept(tmp_path):
    for round in (1, 2, 3, 10):
        checkpoint.save(tmp_path, round, {"weights": torch.tensor(float(round))}, keep=2)
    assert checkpoint.rounds(tmp_path) == [3, 10]
    assert len(list(tmp_path.iterdir())) == 4
    assert checkpoint.load(tmp_path)[1]["weights"] == 10
    checkpoint.save(tmp_path, 11, {}, keep=1)
    assert checkpoint.rounds(tmp_path) == [11]


@pytest.mark.parametrize("keep", range(1, 9))
def test_as_many_are_kept_as_asked_while_there_are_few(keep, tmp_path):
    for round in range(1, 12):
        checkpoint.save(tmp_path, round, {}, keep=keep)
        assert checkpoint.rounds(tmp_path) == list(range(max(1, round - keep + 1), round + 1))


def test_the_same_round_may_be_written_again(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path, 5, {"value": value, "w": torch.tensor(value)})
    assert checkpoint.load(tmp_path) == (5, {"value": 2, "w": torch.tensor(2)})


def tear_tensors(folder):
    path = folder / "round-00000002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def tear_manifest(folder):
    path = folder / "round-00000002.json"
    path.write_text(path.read_text()[: len(path.read_text()) // 2])


def lose_tensors(folder):
    (folder / "round-00000002.safetensors").unlink()


def lose_manifest(folder):
    (folder / "round-00000002.json").unlink()


def flip_header(folder):
    path = folder / "round-00000002.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def not_a_manifest(folder):
    (folder / "round-00000002.json").write_text(json.dumps([1, 2]))


def wrong_reference(folder):
    path = folder / "round-00000002.json"
    path.write_text(path.read_text().replace('"t0"', '"t9"'))


def unknown_node(folder):
    path = folder / "round-00000002.json"
    path.write_text(path.read_text().replace('"tensor"', '"object"'))


TEARS = [tear_tensors, tear_manifest, lose_tensors, lose_manifest]
TEARS += [flip_header, not_a_manifest, wrong_reference, unknown_node]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_newest_checkpoint_is_passed_over(tear, tmp_path):
    for round in (1, 2):
        checkpoint.save(tmp_path, round, {"weights": torch.full((5,), float(round))})
    tear(tmp_path)
    round, state = checkpoint.load(tmp_path)
    assert round == 1
    assert torch.equal(state["weights"], torch.ones(5))


def test_a_kill_between_the_two_files_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"weights": torch.ones(2)})
    real = checkpoint.os.replace

    class Killed(BaseException):
        pass

    def replace(source, target):
        if str(target).endswith(".json"):
            raise Killed
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, 2, {"weights": torch.zeros(2)})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[0] == 1
    checkpoint.save(tmp_path, 2, {"weights": torch.zeros(2)})
    checkpoint.save(tmp_path, 3, {"weights": torch.zeros(2)})
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}  # nothing half-written is left


def test_no_readable_checkpoint_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="there is none"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, 2, {"weights": torch.ones(2)})
    tear_tensors(tmp_path)
    with pytest.raises(UserError, match=r"can be read \(round 2: round-00000002.safetensors has \d+ bytes instead"):
        checkpoint.load(tmp_path)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Neither by us nor by torch or NumPy on our behalf: a pickle in place of the tensors does not run."""
    fired = []

    class Bomb:
        def __reduce__(self):
            return fired.append, (1,)

    checkpoint.save(tmp_path, 1, nested())
    path = tmp_path / "round-00000001.safetensors"
    manifest = tmp_path / "round-00000001.json"
    path.write_bytes(pickle.dumps({"t0": Bomb()}))
    described = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**described, "bytes": path.stat().st_size}))
    with pytest.raises(UserError):
        checkpoint.load(tmp_path)
    assert not fired

    def refuse(*_, **__):
        raise AssertionError("a pickle was loaded")

    checkpoint.save(tmp_path, 2, nested())
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert checkpoint.load(tmp_path)[0] == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": {1: "a"}}, r"string keys, got \[1\]"),
        ({"x": object()}, "must be tensors, numbers, strings, dicts and lists, got object"),
        ({"x": {1, 2}}, "got set"),
        ({"x": 1j}, "got complex"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_replaced(state, message, tmp_path):
    checkpoint.save(tmp_path, 1, {"weights": torch.ones(1)})
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path, 2, state)
    assert checkpoint.rounds(tmp_path) == [1]


def test_foreign_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "round-notes.json").write_text("{}")
    (tmp_path / "round-00000009.json.bak").write_text("{}")
    checkpoint.save(tmp_path, 1, {})
    assert checkpoint.rounds(tmp_path) == [1]
    assert (tmp_path / "round-notes.json").exists()


def test_a_torn_newer_checkpoint_never_costs_the_one_just_written(tmp_path):
    checkpoint.save(tmp_path, 20, {"w": torch.zeros(3)}, keep=1)
    (tmp_path / "round-00000020.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, 2, {"w": torch.ones(3)}, keep=1)
    assert checkpoint.load(tmp_path)[0] == 2
