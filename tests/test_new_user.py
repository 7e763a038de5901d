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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sampler=power_of_choice", "sampler.num_candidates=2", "partition.num_clients=8"], "num_candidates >= the"),
        (["sampler=cyclic", "sampler.num_groups=3", "fraction=1"], "larger than the 2 clients of group 0"),
    ],
)
def test_a_cohort_that_no_sampler_can_draw_is_refused_before_anything_is_written(words, said, capsys):
    assert cli.main(["run", *(w for w in SMALL if w.split("=")[0] not in "".join(words)), *words]) == cli.WRONG_INPUT
    assert said in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_a_file_that_is_no_archive_is_not_answered_with_advice_to_unpickle(capsys):
    Path("junk.npz").write_text("hello")
    assert cli.main(["run", *SMALL, "data=npz", "data.path=junk.npz"]) == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert "junk.npz is not a readable .npz" in said
    assert "allow_pickle" not in said
