"""What the run folder's logs hold after appends, kills in mid-line and resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fedsim.errors import UserError
from fedsim.files import atomic
from fedsim.metrics.client_log import ClientLog
from fedsim.metrics.records import RoundLog, write_json
from fedsim.rng import generator


def _filled(path, rounds=5):
    log = RoundLog(path)
    for round in range(1, rounds + 1):
        log.append(round, {"loss": 1 / round})
    log.close()
    return log


def test_rows_come_back_to_the_bit(tmp_path):
    floats = generator(0, "test").normal(size=50) * 10.0 ** generator(1, "test").integers(-300, 300, 50)
    log = RoundLog(tmp_path / "run" / "rounds.jsonl")
    row = {f"x{i}": value for i, value in enumerate(floats.tolist())}
    log.append(1, row | {"text": "é", "flag": True, "none": None, "count": 2**60})
    log.append(
        3, {"single": torch.tensor(0.1), "int": torch.tensor(7), "numpy": np.float64(0.1), "flag": torch.tensor(True)}
    )
    first, second = RoundLog.read(log.path)  # readable while it is open
    assert first == {"round": 1, **row, "text": "é", "flag": True, "none": None, "count": 2**60}
    assert second == {"round": 3, "single": float(np.float32(0.1)), "int": 7, "numpy": 0.1, "flag": True}
    assert next(iter(second)) == "round"
    log.close()


def test_what_is_not_finite_is_null_and_lines_are_strict_json(tmp_path):
    log = RoundLog(tmp_path / "rounds.jsonl")
    log.append(1, {"a": math.nan, "b": -math.inf, "c": torch.tensor(torch.nan), "d": np.float32("inf")})
    log.close()
    assert log.path.read_text() == '{"round": 1, "a": null, "b": null, "c": null, "d": null}\n'


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_kill_in_mid_line_costs_that_line(tmp_path, cut):
    path = tmp_path / "rounds.jsonl"
    _filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [row["round"] for row in RoundLog.read(path)] == [1, 2, 3, 4]
    log = RoundLog(path)
    assert log.last_round == 4
    log.append(5, {"loss": 0.2})
    log.close()
    assert path.read_bytes() == whole


def test_truncation_to_the_round_of_a_checkpoint(tmp_path):
    path = tmp_path / "rounds.jsonl"
    whole = _filled(path) and path.read_bytes()
    log = RoundLog(path)
    log.append(6, {"loss": 9.0})
    log.truncate_to(3)
    assert log.last_round == 3
    for round in (4, 5):
        log.append(round, {"loss": 1 / round})
    log.close()
    assert path.read_bytes() == whole
    log.truncate_to(0)
    assert path.read_bytes() == b""
    RoundLog(tmp_path / "absent.jsonl").truncate_to(3)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("line", ["{broken}", "[1]", '{"loss": 1}', '{"round": 1}', '{"round": "x"}', "\udce9"])
def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b'{"round": 1}\n' + line.encode(errors="surrogateescape") + b'\n{"round": 2}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 2"):
        RoundLog(path)
    assert path.read_bytes() == before


def test_rows_that_do_not_fit_are_refused(tmp_path):
    log = _filled(tmp_path / "rounds.jsonl", rounds=2)
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match="rounds of a log ascend: got round 2 after round 2"):
        log.append(2, {})
    with pytest.raises(ValueError, match="are flat, got several values for recall, more"):
        log.append(3, {"recall": torch.ones(3), "more": {"a": 1}, "fine": 1})
    with pytest.raises(ValueError, match="'round' is the log's own"):
        log.append(3, {"round": 3})
    with pytest.raises(TypeError, match="got object"):
        log.append(3, {"x": object()})
    log.close()
    assert log.path.read_bytes() == before


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_piece(tmp_path):
    class Full:
        """Takes ten bytes, then the disk is full."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    log = RoundLog(tmp_path / "rounds.jsonl")
    log.append(1, {"loss": 1.0})
    before = log.path.read_bytes()
    log._file = Full(log._file)
    with pytest.raises(OSError, match="No space left"):
        log.append(2, {"loss": 0.5})
    log.close()
    assert log.path.read_bytes() == before
    assert log.last_round == 1


def test_write_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": torch.arange(3), "b": [np.float64(0.5), math.nan], "c": {"d": tmp_path}})
    assert json.loads(path.read_text()) == {"a": [0, 1, 2], "b": [0.5, None], "c": {"d": str(tmp_path)}}
    before = path.read_bytes()
    with pytest.raises(TypeError, match="got object"):
        write_json(path, {"x": object()})
    with pytest.raises(KeyboardInterrupt), atomic(path) as file:
        _interrupted(file)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def _interrupted(file):
    file.write(b"half")
    raise KeyboardInterrupt


def _rows(log):
    log.merge()
    return pq.read_table(log.path).to_pylist()


def test_client_rows_keep_types_and_leave_absent_values_null(tmp_path):
    log = ClientLog(tmp_path)
    log.append(1, torch.tensor([2, 5]), {"loss": torch.tensor([0.5, torch.nan]), "num_steps": torch.tensor([3, 4])})
    log.append(2, np.array([7]), {"accuracy": np.array([0.25]), "file": [1]})
    log.append(3, torch.zeros(0, dtype=torch.int64), {"loss": torch.zeros(0)})
    nothing = {"loss": None, "num_steps": None, "accuracy": None, "file": None}
    assert _rows(log) == [
        nothing | {"round": 1, "client": 2, "loss": 0.5, "num_steps": 3},
        nothing | {"round": 1, "client": 5, "num_steps": 4},
        nothing | {"round": 2, "client": 7, "accuracy": 0.25, "file": 1},
    ]
    schema = pq.read_schema(log.path)
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "round": "int64", "client": "int64", "loss": "float", "num_steps": "int64", "accuracy": "double",
        "file": "int64",
    }  # fmt: skip


def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_table(tmp_path):
    def append(log, rounds):
        for round in rounds:
            log.append(round, np.arange(3), {"loss": np.arange(3) / round})

    straight = ClientLog(tmp_path / "straight")
    append(straight, range(1, 9))
    killed = ClientLog(tmp_path / "killed")
    append(killed, (1, 2))
    killed.flush()
    append(killed, (3, 4, 5))
    killed.flush()  # the part of rounds 3 to 5 is written, but the checkpoint stayed at 4
    append(killed, (6,))
    resumed = ClientLog(tmp_path / "killed")
    assert resumed.last_round == 5
    resumed.truncate_to(4)
    assert resumed.last_round == 4
    append(resumed, range(5, 9))
    assert _rows(resumed) == _rows(straight)
    assert [path.name for path in sorted(resumed.parts.iterdir())] == [
        "00000001-00000002.safetensors", "00000003-00000004.safetensors", "00000005-00000008.safetensors",
    ]  # fmt: skip


def test_rounds_between_two_checkpoints_are_one_part_whatever_columns_they_have(tmp_path):
    log = ClientLog(tmp_path)
    for round in range(1, 7):
        seen = {"hits": np.array([round, 0]), "seen": np.array([True, False])} if round % 2 else {}
        log.append(round, [0, 1], {"loss": [0.5, 1.5], **seen})
    log.flush()
    assert len(list(log.parts.iterdir())) == 1
    log.truncate_to(4)
    rows = _rows(log)
    assert [row["hits"] for row in rows] == [1, 0, None, None, 3, 0, None, None]
    assert [row["seen"] for row in rows] == [True, False, None, None, True, False, None, None]
    assert [row["loss"] for row in rows] == [0.5, 1.5] * 4


def test_merging_again_takes_in_later_rounds(tmp_path):
    log = ClientLog(tmp_path)
    assert _rows(log) == []
    log.append(1, [0], {"loss": [1.0]})
    assert len(_rows(log)) == 1
    log.append(2, [0], {"loss": [1.0]})
    assert [row["round"] for row in _rows(log)] == [1, 2]
    log.truncate_to(0)
    assert _rows(log) == []


def test_columns_that_do_not_fit_are_refused(tmp_path):
    log = ClientLog(tmp_path)
    log.append(1, [0, 1], {})
    for columns, message in [
        ({"loss": [1.0]}, r"'loss' must have one number for each of 2 clients, got float64 \(1,\)"),
        ({"name": ["a", "b"]}, "'name' must have one number"),
        ({"client": [0, 1]}, "'client' is the log's own"),
    ]:
        with pytest.raises(ValueError, match=message):
            log.append(2, [0, 1], columns)
    with pytest.raises(ValueError, match="rounds of a log ascend"):
        log.append(1, [0], {})


def test_a_part_that_is_no_part_is_one_clear_error(tmp_path):
    log = ClientLog(tmp_path)
    log.append(1, [0], {"loss": [1.0]})
    log.flush()
    (tmp_path / "clients" / "00000001-00000001.safetensors").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is no part of a run's client log"):
        log.merge()
    assert not log.path.exists()


def test_parts_of_an_earlier_version_are_not_passed_over(tmp_path):
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "00000001-00000004.npz").touch()
    with pytest.raises(UserError, match=r"00000001-00000004\.npz is of an earlier version of fedsim"):
        ClientLog(tmp_path)
