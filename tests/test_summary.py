"""What the last lines of a run say: what was asked for, and nothing that was not."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet
import pytest

import fedsim
from fedsim.attacks.adversary import Adversary
from fedsim.attacks.sign_flip import SignFlip
from fedsim.summary import plan_line, shown

TINY = ("data=blobs", "model=logreg", "num_rounds=6", "fraction=0.4")
NAMES = {
    "simulated_seconds",
    "staleness_mean",
    "num_lost",
    "num_attackers",
    "honest_accuracy_mean",
    "backdoor_accuracy",
}


def run(folder, *words):
    return fedsim.simulate(*TINY, *words, folder=folder / "run")


def test_a_plain_run_is_not_timed(tmp_path):
    assert NAMES.isdisjoint(shown(run(tmp_path).summary))


def test_a_delayed_run_shows_its_clock_and_the_mean_over_updates(tmp_path):
    result = run(tmp_path, "mode=fixed_delay", "mode.delay=2", "devices=tiers", "devices.dropout=0.3")
    said = shown(result.summary)
    table = pyarrow.parquet.read_table(result.folder / "clients.parquet")
    staleness = table.column("staleness").drop_null().to_numpy()
    assert staleness.max() > 0
    assert said["staleness_mean"] == pytest.approx(np.mean(staleness))
    assert said["num_lost"] == sum(row["num_lost"] for row in result.rounds) > 0
    assert said["simulated_seconds"] == result.rounds[-1]["simulated_seconds"]


def test_an_attacked_run_shows_attackers_and_the_honest(tmp_path):
    said = shown(run(tmp_path, "attack=backdoor", "attack.fraction=0.3", "partition.num_clients=10").summary)
    assert NAMES & said.keys() == {"num_attackers", "honest_accuracy_mean", "backdoor_accuracy"}
    assert said["num_attackers"] == 3


def test_the_plan_says_who_attacks():
    plan = {
        "dtype": "float32", "precision": "fp32", "engine": "vectorized", "why": "w", "device": "cpu", "threads": 1,
        "parameters": 5, "cohort": 4, "clients": 10, "rows": "streamed", "evaluate_every": 1,
        "evaluate_clients_every": 1, "checkpoint_every": 1,
    }  # fmt: skip
    adversary = Adversary(SignFlip(), clients=np.arange(10), num_clients=10, fraction=0.3)
    assert "attack" not in plan_line(plan)
    assert "4 of 10 clients a round, 3 of 10 attack (SignFlip), updates" in plan_line(plan, adversary)


def test_an_attack_has_two_tenths_of_the_clients_unless_told(tmp_path):
    assert run(tmp_path, "attack=alie", "partition.num_clients=10").summary["num_attackers"] == 2


def test_the_best_round_is_chosen_on_validation_data_or_not_at_all(tmp_path):
    result = run(tmp_path, "metrics.every=1")
    best = max(result.rounds, key=lambda row: row["validation_accuracy"])
    assert result.summary["best_validation"]["round"] == best["round"]
    without = fedsim.simulate(*TINY, "metrics.every=1", "data.validation=0", folder=tmp_path / "without")
    assert set(without.summary["best_validation"].values()) == {None}
