"""The text source: windows and speakers by hand, and no test character in any training window."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.check import check_dataset
from fedsim.data.text import text
from fedsim.errors import UserError

REAL_DATA = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")

PLAY = "ANN:\nabcdef\nghij\n\nBOB:\nklmno: pq\n\nANN:\nrstu\n\nCAT:\nx\n"


def load(folder, content=PLAY, **changes):
    (folder / "play.txt").write_text(content, encoding="utf-8")
    arguments = {"window": 3, "stride": 1, "min_samples": 1, "test_fraction": 0.4} | changes
    return text(path=str(folder / "play.txt"), **arguments)


def read(data, row):
    return "".join(data.class_names[c] for c in data.x[row]), data.class_names[data.y[row]]


def test_windows_and_their_next_characters_by_hand(tmp_path):
    data = check_dataset(load(tmp_path))
    assert data.client_names == ("ANN", "BOB")  # CAT's "x\n" is too short for a window
    # ANN says "abcdef\nghij\n" and "rstu\n", 17 characters: 10 to train on, 7 to test on; BOB 10: 6 and 4.
    rows = {
        (split, name): [read(data, i) for i in data.splits[split] if data.client[i] == k]
        for split in ("train", "test")
        for k, name in enumerate(data.client_names)
    }
    assert rows["train", "ANN"] == [
        ("abc", "d"),
        ("bcd", "e"),
        ("cde", "f"),
        ("def", "\n"),
        ("ef\n", "g"),
        ("f\ng", "h"),
        ("\ngh", "i"),
    ]
    assert rows["test", "ANN"] == [("j\nr", "s"), ("\nrs", "t"), ("rst", "u"), ("stu", "\n")]
    assert rows["train", "BOB"] == [("klm", "n"), ("lmn", "o"), ("mno", ":")]
    assert rows["test", "BOB"] == [(" pq", "\n")]
    assert data.class_names == tuple("\n :abcdefghijklmnopqrstu")


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 3), (7, 2), (3, 20)])
def test_windows_equal_a_naive_loop_and_test_text_is_never_trained_on(window, stride, tmp_path):
    rng = np.random.default_rng(0)
    # Every character of the corpus is different, so a window says where it is from.
    corpus = "".join(chr(0x4E00 + i) for i in rng.permutation(300))
    data = load(tmp_path, corpus, speakers=False, window=window, stride=stride)
    cut = 180
    expected = [
        (part[i : i + window], part[i + window])
        for part in (corpus[:cut], corpus[cut:])
        for i in range(0, len(part) - window, stride)
    ]
    assert [read(data, i) for i in range(len(data.x))] == expected
    seen = {split: {int(c) for i in data.splits[split] for c in [*data.x[i], data.y[i]]} for split in data.splits}
    assert not seen["train"] & seen["test"]
    assert data.client is None


def test_speakers_with_few_windows_are_left_out(tmp_path):
    assert load(tmp_path, min_samples=3).client_names == ("ANN", "BOB")  # BOB has three
    assert load(tmp_path, min_samples=4).client_names == ("ANN",)
    assert set(load(tmp_path, min_samples=4).client) == {0}


def test_windows_line_ends_are_read_alike(tmp_path):
    (tmp_path / "dos.txt").write_bytes(PLAY.replace("\n", "\r\n").encode())
    dos = text(path=str(tmp_path / "dos.txt"), window=3, stride=1, min_samples=1, test_fraction=0.4)
    assert np.array_equal(dos.x, load(tmp_path).x)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"window": 0}, ValueError, "window must be ≥ 1, got 0"),
        ({"stride": 0}, ValueError, "stride must be ≥ 1, got 0"),
        ({"min_samples": 0}, ValueError, "min_samples must be ≥ 1, got 0"),
        ({"test_fraction": 1}, ValueError, "test_fraction"),
        ({"window": 50}, UserError, "leaves 0 training and 0 test windows"),
        ({"content": "no speaker at all"}, UserError, "set data.speakers=false"),
    ],
)
def test_wrong_arguments_are_named(changes, error, match, tmp_path):
    with pytest.raises(error, match=match):
        load(tmp_path, **changes)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        text(path=str(tmp_path / "a.txt"))


def test_shakespeares_speakers():
    if not (REAL_DATA / "shakespeare").is_dir():
        pytest.skip(f"shakespeare is not in {REAL_DATA}; set FEDSIM_DATA")
    data = text(path="shakespeare/input.txt", root=str(REAL_DATA))
    assert {"ROMEO", "JULIET", "KING RICHARD III", "First Citizen"} <= set(data.client_names)
    romeo = data.client_names.index("ROMEO")
    first = next(i for i in data.splits["train"] if data.client[i] == romeo)
    assert read(data, first)[0].startswith("Is the day so young?\nAy me! sad hours seem long.")
    sizes = np.bincount(data.client[data.splits["train"]])
    assert sizes.min() >= 20
    assert 200 <= len(sizes) <= 220
    assert data.num_classes == 64
