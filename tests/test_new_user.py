"""What a new user runs into in the first hour, through the command line."""

import datetime
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fedsim
from fedsim import cli
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Dataset
from fedsim.errors import UserError
from fedsim.local import LocalTraining
from fedsim.strategies.fedld import FedLD

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


def refused(words, capsys):
    """Run a command that must be refused, and return what it said."""
    assert cli.main(list(words)) == cli.WRONG_INPUT
    return capsys.readouterr().err


def test_a_root_without_the_data_set_is_said_at_once_and_no_network_is_asked(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import would be an ImportError, and another message
    said = refused(["run", "data=mnist", "data.root=/nope"], capsys)
    assert "there is no folder /nope" in said
    assert "leave data.root out" in said
    Path("shelf").mkdir()
    said = refused(["run", "data=mnist", "data.root=shelf"], capsys)
    assert f"looked for {Path.cwd()}/shelf/ylecun/mnist and {Path.cwd()}/shelf/mnist" in said


def test_a_sweep_refuses_what_is_wrong_before_it_loads_or_starts_anything(capsys, monkeypatch):
    started = []
    monkeypatch.setattr("fedsim.sweep.drive.start_server", lambda: started.append(1))
    assert "did you mean 'fedld'" in refused(["sweep", "strategy=fedavg,fedldd"], capsys)
    assert "no setting or group 'clent'" in refused(["sweep", "seed=0,1", "clent.lr=1"], capsys)
    assert not started
    # Types and values are the parts' own to check: that needs torch, but neither data nor a trial.
    assert "client.lr must be a number, got 'abc'" in refused(["sweep", "seed=0,1", "client.lr=abc"], capsys)
    assert "client.lr must be > 0, got -1.0" in refused(["sweep", "client.lr=0.1,-1"], capsys)
    assert "partition.alpha must be" in refused(["sweep", "partition.alpha=1,0"], capsys)
    assert "Krum needs num_byzantine >= 0" in refused(["sweep", "strategy=krum", "strategy.num_byzantine=1,-1"], capsys)
    assert not Path("outputs").exists()


def test_text_in_a_model_of_numbers_or_images_says_which_model_reads_it(capsys):
    Path("play.txt").write_text("A:\nto be or not to be\n\nB:\nthat is the question\n" * 20)
    text = ["run", "data=text", "data.path=play.txt", "partition.num_clients=2", "num_rounds=1"]
    for model in ("mlp", "cnn"):
        assert "model=char_gru" in refused([*text, f"model={model}"], capsys), model
    assert "choose text data, or model=mlp" in refused(["run", "model=char_gru"], capsys)


def test_an_unknown_choice_says_where_further_ones_come_from(capsys):
    said = refused(["run", "strategy=foo"], capsys)
    assert "--config-dir" in said
    assert "pip install" in said
    assert "pip install" not in refused(["run", "strategy=fedldd"], capsys)  # there the nearest name is the answer


def test_a_drawn_partition_is_named_by_what_was_drawn():
    assert cli.main(["partition", "partition=shards", "partition.num_clients=4"]) == 0
    (folder,) = Path("outputs").glob("*/*")
    assert folder.name.endswith("-partition-shards")


def test_objects_name_the_folder_and_leave_nothing_of_what_they_replace():
    x, y = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    splits = {"train": np.arange(40), "test": np.arange(40, 60)}
    result = fedsim.simulate(
        "partition=iid", "partition.num_clients=3", "client.lr=0.25", data=Dataset(x, y, splits, num_classes=2),
        model=torch.nn.Linear(3, 2), strategy=FedLD(), num_rounds=1,
    )  # fmt: skip
    assert result.folder.name.endswith("-fedld")
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert config["data"] == {"_target_": "<Dataset>", "validation": 0.1}
    assert config["strategy"] == {"_target_": "<FedLD>"}
    assert config["model"] == {"_target_": "<Linear>", "seed": None, "init": None, "trainable": None, "local": None}
    assert config["client"]["lr"] == 0.25  # a group without an object stays as it is
    assert config["partition"]["num_clients"] == 3
    training = LocalTraining(lr=0.125, batch_size=7)
    result = fedsim.simulate(
        "model=logreg", client=CrossEntropy(), training=training, num_rounds=1, folder="other", strategy="fedavg"
    )
    client = yaml.safe_load(Path("other/config.yaml").read_text())["client"]
    assert (client["_target_"], client["lr"], client["batch_size"]) == ("<CrossEntropy>", 0.125, 7)


def test_a_run_is_resumed_with_the_config_dir_that_it_had(capsys):
    own = Path("mine/strategy")
    own.mkdir(parents=True)
    own.joinpath("half.yaml").write_text(
        "# Half.\n_target_: fedsim.strategies.fedavg.FedAvg\nserver_lr: 0.5\nserver_momentum: 0.0\n"
    )
    assert cli.main(["run", *SMALL, "strategy=half", "--config-dir", "mine", "hydra.run.dir=a"]) == 0
    assert cli.main(["run", "resume=a", "num_rounds=2", "--config-dir", "mine"]) == 0, capsys.readouterr().err
    assert len(Path("a/rounds.jsonl").read_text().splitlines()) == 2
    Path("other").mkdir()
    said = refused(["run", "resume=a", "num_rounds=3", "--config-dir", "other"], capsys)
    assert "started with mine" in said


def test_batch_norm_over_one_sample_says_what_to_do(capsys):
    def model(input_shape, num_classes):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, num_classes)
        )

    with pytest.raises(RuntimeError, match=r"the last batch of this client has one: choose another client\.batch_size"):
        fedsim.simulate("partition=iid", "partition.num_clients=10", "client.batch_size=1", model=model, num_rounds=1)


def test_arrays_that_are_no_tensors_are_named(capsys):
    splits = {"train": np.arange(2), "test": np.arange(2, 4)}
    data = Dataset(np.zeros((4, 2), np.float32), torch.zeros(4).long(), splits, num_classes=2)
    with pytest.raises(UserError, match=r"x must be a torch tensor, got numpy\.ndarray; write torch\.as_tensor\(x\)"):
        fedsim.simulate(data=data, num_rounds=1)
