"""What a new user runs into in the first hour, through the command line."""

import datetime
from pathlib import Path

import pytest

from fedsim import cli

SMALL = ("num_rounds=1", "partition.num_clients=4", "model=logreg")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs_that_start_in_one_second_get_folders_of_their_own(capsys):
    now = datetime.datetime.now()
    for second in range(60):  # somebody else's runs have every name of the next minute
        taken = now + datetime.timedelta(seconds=second)
        folder = Path(f"outputs/{taken:%Y-%m-%d}/{taken:%H-%M-%S}-fedavg")
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
    assert cli.main(["run", *SMALL]) == 0, capsys.readouterr().err
    (mine,) = Path("outputs").glob("*/*-fedavg-2")
    assert (mine / "summary.json").exists()


def test_a_folder_that_was_asked_for_is_never_written_twice(capsys):
    words = ["run", *SMALL, "hydra.run.dir=mine"]
    assert cli.main(words) == 0
    before = Path("mine/rounds.jsonl").read_bytes()
    assert cli.main(words) == cli.WRONG_INPUT
    assert "mine holds a run already" in capsys.readouterr().err
    assert Path("mine/rounds.jsonl").read_bytes() == before
