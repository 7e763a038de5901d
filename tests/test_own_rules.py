"""What a person is told whose own rule is half a rule: what is missing, in one line."""

import pytest
import torch

import fedsim
from fedsim.build import build
from fedsim.cli import main
from fedsim.config import compose
from fedsim.errors import UserError

TINY = ["data=blobs", "model=logreg", "partition.num_clients=4", "num_rounds=1", "threads=1"]


class Own:
    def __init__(self, answer, state=None):
        self.answer, self.state = answer, {} if state is None else state

    def init(self, layout, num_clients):
        return self.state

    def __call__(self, cohort, state):
        return self.answer(cohort.rows.mean(0), state)


class WithoutCall:
    def init(self, layout, num_clients):
        return {}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Own(lambda d, s: d), r"Own must return \(delta \(D,\), state, metrics\), got Tensor"),
        (Own(lambda d, s: (d, s)), r"Own must return \(delta \(D,\), state, metrics\), got a tuple of 2"),
        (Own(lambda d, s: (d[:2], s, {})), r"Own must return a step of shape \(\d+,\), got \(2,\)"),
        (Own(lambda d, s: (0.0, s, {})), r"Own must return a step of shape \(\d+,\), got float"),
        (Own(lambda d, s: (d, s, None)), "Own must return its metrics as a dict, got nothing"),
        (Own(lambda d, s: (d, None, {})), "Own must return its state as a dict, got nothing"),
        (Own(lambda d, s: (d, s, {}), state=[]), "Own.init must return a dict, got list"),
        (
            WithoutCall(),
            "strategy must be a rule, which has `init` and `__call__`, or a Flower strategy, got WithoutCall",
        ),
    ],
)
def test_half_a_rule_is_told_what_it_lacks(tmp_path, rule, said):
    with pytest.raises(UserError, match=said):
        fedsim.simulate(*TINY, strategy=rule, folder=tmp_path / "run")


def test_a_choice_without_a_target_is_no_strategy(tmp_path):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text("# Mine.\nlr: 1.0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"strategy must be a rule, .* got a YAML file without _target_"):
        build(compose([*TINY, "strategy=mine"], config_dir=tmp_path))


def test_an_error_of_ones_own_names_its_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text("# Mine.\n_target_: own_rule.Mine\n", encoding="utf-8")
    (tmp_path / "own_rule.py").write_text(
        "class Mine:\n    def init(self, layout, n):\n        return {}\n\n"
        "    def __call__(self, cohort, state):\n        return torch.zeros(3), state, {}\n", encoding="utf-8",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["run", *TINY, "strategy=mine", "--config-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "NameError: name 'torch' is not defined (" in err
    assert "own_rule.py:6, `return torch.zeros(3), state, {}`; -v shows more)" in err


def test_a_whole_rule_runs(tmp_path):
    result = fedsim.simulate(*TINY, strategy=Own(lambda d, s: (d, s, {"x": torch.ones(())})), folder=tmp_path / "run")
    assert result.rounds[-1]["x"] == 1
