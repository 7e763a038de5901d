"""DP-FedAvg against loops and closed forms; its account against published values and the definitions it rests on."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special, stats

from fedsim import simulate
from fedsim.errors import UserError
from fedsim.flower.strategy import RuleStrategy
from fedsim.laws import cohort_of
from fedsim.metrics.privacy import ORDERS, RDP
from fedsim.report.command import report
from fedsim.report.tables import lower_is_better
from fedsim.strategies.dp_fedavg import DPFedAvg
from fedsim.summary import SHOWN
from fedsim.testing import build_rule

needs_library = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("dp_accounting"), reason="the extra `privacy` is not installed"
)


def step_of(rule, rows, num_clients=20, round=1, seed=0, **described):
    cohort = cohort_of(rows, round=round, seed=seed, **described)
    return rule(cohort, rule.init(cohort.layout, num_clients))


def rows_of(seed, count=7, size=5):
    return np.random.default_rng(seed).normal(size=(count, size)) * 3


@pytest.mark.parametrize("seed", range(4))
def test_without_noise_it_is_the_clipped_sum_over_the_expected_cohort(seed):
    rows = rows_of(seed)
    expected = sum(x * min(1.0, 2.0 / math.sqrt(sum(v * v for v in x))) for x in rows) / 6  # q N = 0.3 · 20
    rule = DPFedAvg(max_norm=2.0, noise_multiplier=0.0, fraction=0.3)
    delta, _, metrics = step_of(rule, rows, weights=np.arange(1, 8))  # no weight counts
    np.testing.assert_allclose(delta, expected, rtol=1e-12)
    assert metrics["noise_std"] == 0
    assert float(metrics["clipped_fraction"]) == np.mean(np.linalg.norm(rows, axis=1) > 2)


def test_one_client_more_moves_the_step_by_its_share_of_the_bound_at_most():
    rule = DPFedAvg(max_norm=2.0, noise_multiplier=1.0, fraction=0.3)
    rows = np.concatenate([rows_of(0), [[1e12, 0, 0, 0, 0]]])
    moved = step_of(rule, rows)[0] - step_of(rule, rows[:-1])[0]  # the same noise
    assert float(moved.norm()) == pytest.approx(2.0 / 6, rel=1e-9)


def test_noise_has_the_deviation_it_says_and_depends_on_seed_and_round_alone():
    rule = DPFedAvg(max_norm=0.5, noise_multiplier=1.2, fraction=0.5)
    rows = np.zeros((3, 40000))
    delta, _, metrics = step_of(rule, rows)
    scale = 1.2 * 0.5 / 10
    assert metrics["noise_std"] == pytest.approx(scale)
    assert stats.kstest(np.asarray(delta) / scale, "norm").pvalue > 1e-3  # 40,000 draws, a fixed seed
    assert torch.equal(delta, step_of(rule, rows)[0])
    assert not torch.equal(delta, step_of(rule, rows, round=2)[0])
    assert not torch.equal(delta, step_of(rule, rows, seed=1)[0])


def test_an_inner_rule_sees_one_update_and_keeps_its_memory():
    rows = rows_of(1)
    inner = build_rule("fedavgm")
    rule = DPFedAvg(rule=inner, max_norm=1.0, noise_multiplier=0.5, fraction=0.3)
    cohort = cohort_of(rows)
    plain, state = DPFedAvg(max_norm=1.0, noise_multiplier=0.5, fraction=0.3), rule.init(cohort.layout, 20)
    kept = inner.init(cohort.layout, 20)
    for round in (1, 2):
        cohort = cohort_of(rows, round=round)
        private = step_of(plain, rows, round=round)[0]
        expected, kept, _ = inner(cohort_of(private[None].numpy(), weights=[1.0], round=round), kept)
        delta, state, _ = rule(cohort, state)
        torch.testing.assert_close(delta, expected)


def sampled_gaussian_rdp(order, sampling, noise):
    """log Σ_k C(α,k) (1−q)^(α−k) q^k exp((k²−k)/2z²) / (α−1): Mironov, Talwar & Zhang 2019, section 3.3."""
    terms = [
        math.log(math.comb(order, k)) + (order - k) * math.log1p(-sampling) + k * math.log(sampling)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    return special.logsumexp(terms) / (order - 1)


# (q, z, T, δ, ε): the table of TensorFlow Privacy's MNIST tutorial (Abadi et al.'s moments accountant), and the
# language model of McMahan et al., ICLR 2018 (763,430 users, 5000 a round in expectation, 5000 rounds).
PUBLISHED = [
    (256 / 60000, 1.3, 15 * 60000 // 256, 1e-5, 1.19, 0.01),
    (256 / 60000, 1.1, 60 * 60000 // 256, 1e-5, 3.01, 0.01),
    (256 / 60000, 0.7, 45 * 60000 // 256, 1e-5, 7.10, 0.01),
    (5000 / 763430, 1.0, 5000, 1e-9, 4.634, 0.01),
]


@needs_library
@pytest.mark.parametrize(("sampling", "noise", "steps", "delta", "published", "rel"), PUBLISHED)
def test_account_against_published_values(sampling, noise, steps, delta, published, rel):
    moments = {order: steps * sampled_gaussian_rdp(order, sampling, noise) for order in range(2, 257)}
    # as in those papers (Mironov 2017, proposition 3): this ties the loop above to what was published
    then = min(e + math.log(1 / delta) / (a - 1) for a, e in moments.items())
    assert then == pytest.approx(published, rel=rel)
    # today's conversion (Canonne, Kamath & Steinke 2020, proposition 12) of the same moments
    now = min(moments[a] + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in ORDERS if a in moments)
    found = RDP(delta=delta)(noise_multiplier=noise, sampling=sampling, num_rounds=steps)
    assert found == pytest.approx(now, rel=1e-6)
    assert 0.75 * published < found < published


@needs_library
@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_without_sampling_the_account_bounds_the_gaussian_mechanism(noise):
    """Balle & Wang, ICML 2018, theorem 8: T sums with noise z are one with z / √T, whose δ is known exactly."""
    rounds, delta = 10, 1e-5
    found = RDP(delta=delta)(noise_multiplier=noise, sampling=1.0, num_rounds=rounds)
    z = noise / math.sqrt(rounds)

    def exact(epsilon):
        return stats.norm.cdf(0.5 / z - epsilon * z) - math.exp(epsilon) * stats.norm.cdf(-0.5 / z - epsilon * z)

    assert exact(found) < delta < exact(0.75 * found)


@needs_library
def test_every_row_has_epsilon_and_it_grows(tmp_path):
    simulate(
        "strategy=dp_fedavg", "num_rounds=3", "fraction=0.3", "strategy.noise_multiplier=2", folder=tmp_path / "run"
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    account = RDP(delta=1e-5)
    for number, row in enumerate(rows, 1):
        assert row["epsilon"] == account(noise_multiplier=2.0, sampling=0.3, num_rounds=number)
    assert rows[0]["epsilon"] < rows[1]["epsilon"] < rows[2]["epsilon"]
    assert "Poisson" in (tmp_path / "run" / "config.yaml").read_text()


@needs_library
def test_the_summary_has_what_was_spent_and_a_report_knows_it(tmp_path):
    result = simulate("strategy=dp_fedavg", "num_rounds=2", "fraction=0.3", folder=tmp_path / "run")
    want = RDP(delta=1e-5)(noise_multiplier=1.0, sampling=0.3, num_rounds=2)
    assert (result.summary["epsilon"], result.summary["delta"]) == (want, 1e-5)
    assert {"epsilon", "delta"} <= set(SHOWN)
    text, _ = report([tmp_path / "run"], format="markdown", metric="epsilon")
    assert f"{want:.4f}" in text
    assert lower_is_better("epsilon")


@needs_library
@pytest.mark.parametrize(
    ("word", "named"),
    [("mode=async", "mode Async"), ("mode=deadline", "mode Deadline"), ("availability=bernoulli", "availability Bern")],
)
def test_where_clients_do_not_take_part_independently_there_is_no_epsilon(tmp_path, word, named):
    words = ("strategy=dp_fedavg", "num_rounds=2", "fraction=0.5", "devices=lognormal", word)
    with pytest.warns(UserWarning, match=f"with {named}.* there is no epsilon") as heard:
        result = simulate(*words, folder=tmp_path / "run")
    assert len(heard) == 1
    assert [row["epsilon"] for row in result.rounds] == [None, None]
    assert (result.summary["epsilon"], result.summary["delta"]) == (None, 1e-5)


@needs_library
def test_no_noise_is_warned_of():
    with pytest.warns(UserWarning, match="noise_multiplier=0 is no privacy"):
        DPFedAvg(accountant=RDP(), noise_multiplier=0.0)


@needs_library
@pytest.mark.parametrize("sampler", ["uniform", "cyclic", "size_weighted"])
def test_other_samplers_have_no_epsilon_whoever_made_the_rule(tmp_path, sampler):
    """A cohort of a fixed size is no Poisson cohort, and who takes turns is not drawn at all."""
    words = ("num_rounds=1", "fraction=0.5", "model=logreg", f"sampler={sampler}")
    for name, parts in (
        ("a", {"strategy": "dp_fedavg"}),
        ("b", {"strategy": DPFedAvg(accountant=RDP(), fraction=0.5)}),
    ):
        with pytest.warns(UserWarning, match=r"with sampler \w+ clients do not take part .* there is no epsilon"):
            result = simulate(*words, folder=tmp_path / name, **parts)
        assert result.rounds[0]["epsilon"] is None


@needs_library
@pytest.mark.filterwarnings("error")
def test_where_all_take_part_no_sampler_draws(tmp_path):
    result = simulate(
        "strategy=dp_fedavg", "sampler=uniform", "fraction=1", "num_rounds=1", "model=logreg", folder=tmp_path / "run"
    )
    assert result.rounds[0]["epsilon"] == RDP()(noise_multiplier=1.0, sampling=1.0, num_rounds=1)


@pytest.mark.parametrize(
    "settings",
    [{"strategy": DPFedAvg(fraction=0.1)}, {"overrides": ("strategy=dp_fedavg", "strategy.fraction=0.1")}],
    ids=["object", "yaml"],
)
def test_another_fraction_than_the_runs_is_refused(tmp_path, settings):
    words = ("fraction=0.5", "model=logreg", *settings.pop("overrides", ()))
    with pytest.raises(UserError, match=r"strategy: DPFedAvg's fraction=0.1 is not the run's, 0.5"):
        simulate(*words, num_rounds=1, folder=tmp_path / "run", **settings)


@needs_library
def test_a_deployments_cohorts_have_a_fixed_size_and_no_epsilon():
    rule = DPFedAvg(accountant=RDP(), fraction=0.5)
    shell = RuleStrategy(rule, fraction=0.5)
    with pytest.warns(UserWarning, match="with cohorts of a fixed size clients do not take part independently"):
        shell._inform()
    assert step_of(shell.rule, rows_of(0))[2]["epsilon"] == math.inf
    whole = RuleStrategy(replace(rule, fraction=1.0))
    whole._inform()
    assert whole.rule.accountant == RDP()
    with pytest.raises(ValueError, match=r"fraction=0.5 is not the run's, 0.25"):
        RuleStrategy(rule, fraction=0.25)._inform()


def test_no_noise_is_no_privacy_and_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim\[privacy\]'"):
        RDP()
    monkeypatch.undo()
    if "dp_accounting" in sys.modules:
        assert RDP()(noise_multiplier=0.0, sampling=0.1, num_rounds=1) == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0.0}, "max_norm > 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier >= 0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier >= 0"),
        ({"fraction": 0.0}, "0 < fraction <= 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DPFedAvg(**arguments)
    with pytest.raises(ValueError, match="delta must be in"):
        RDP(delta=1.0)
