"""The helpers for people who write strategies, and how strategies pair themselves with clients."""

import dataclasses
import doctest
import importlib

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedsim.strategies.yoked import Yoked
from fedsim.testing import apply_rule, build_rule, cohort_of, strategy_names


@pytest.mark.parametrize("name", ["testing", "strategies.fedavg", "strategies.fedld"])
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(f"fedsim.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_updates_may_be_any_array(kind):
    assert apply_rule(build_rule("fedavg"), kind([[1.0, 2.0], [3.0, 6.0]]), kind([1, 3])).tolist() == [2.5, 5.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_step_has_the_precision_of_the_updates(dtype):
    assert apply_rule(build_rule("fedavg"), np.ones((2, 3), dtype)).dtype == dtype


def test_non_finite_rows_are_dropped_with_their_weights():
    rows = np.array([[1.0, 2.0], [np.nan, 0.0], [3.0, 6.0], [0.0, np.inf]])
    assert apply_rule(build_rule("fedavg"), rows, [1, 9, 3, 9]).tolist() == [2.5, 5.0]


def test_huge_but_finite_rows_are_kept():
    rows = np.full((2, 2), 1e30, np.float32)  # their squared norms overflow float32
    assert apply_rule(build_rule("fedavg"), rows).tolist() == [np.float32(1e30)] * 2


@pytest.mark.parametrize("name", ["geometric_median", "dnc", "centered_clipping", "krum", "fedavg"])
def test_rows_whose_squares_overflow_float64_are_dropped(name):
    rows = np.ones((7, 4))
    got = apply_rule(build_rule(name), [*rows, [1e200, 0, 0, 0], [-1e308, 1e308, 0, 0]])
    np.testing.assert_allclose(got, apply_rule(build_rule(name), rows))


def test_round_0_is_the_first_round():
    rows = [[3.0, 0.0], [0.0, 1.0]]
    rule = build_rule("fedld", k_proportion=1.0)
    assert apply_rule(rule, rows, round=0).tolist() == [1.5, 0.5]
    assert apply_rule(rule, rows) == pytest.approx([1.35, 0.05])


def test_state_goes_in_and_none_means_no_previous_aggregate():
    rule = build_rule("fedavgm", server_momentum=0.5)
    assert apply_rule(rule, [[2.0]]).tolist() == [2.0]
    assert apply_rule(rule, [[2.0]], state={"velocity": torch.tensor([4.0])}).tolist() == [4.0]
    assert apply_rule(rule, [[2.0]], state={"velocity": torch.zeros(1)}).tolist() == [2.0]


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"updates must be \(K, D\), got shape \(2,\)"):
        cohort_of([1.0, 2.0])
    with pytest.raises(ValueError, match="sizes must sum to D = 3, got 4"):
        cohort_of(np.ones((2, 3)), sizes=(2, 2))
    with pytest.raises(ValueError, match=r"weights must be \(K,\) = \(2,\)"):
        cohort_of(np.ones((2, 3)), [1, 2, 3])


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    defaults = "[{model: mlp}, {compressor: none}, {sampler: uniform}, {client: sgd}, {strategy: fedavg}, _self_]"
    lines = f"defaults: {defaults}\nhydra: {{searchpath: ['pkg://fedsim.configs']}}\n"
    (folder / "main.yaml").write_text(lines)
    return str(folder)


def targets(config_dir, *overrides):
    with initialize_config_dir(config_dir=config_dir, version_base="1.3"):
        config = compose("main", overrides=list(overrides))
    return config.strategy._target_.rpartition(".")[2], config.client._target_.rpartition(".")[2]


@pytest.mark.parametrize(
    ("overrides", "pair"),
    [
        ([], ("FedAvg", "CrossEntropy")),
        (["strategy=fedld"], ("FedLD", "Margin")),
        (["strategy=fedld", "client.margin_lambda=0.2"], ("FedLD", "Margin")),
        (["strategy=fedld", "client=sgd"], ("FedLD", "CrossEntropy")),  # the user's own choice wins
        (["client=sgd", "strategy=fedld"], ("FedLD", "CrossEntropy")),
        (["strategy=fedprox"], ("FedAvg", "FedProx")),
    ],
)
def test_a_strategy_pairs_itself_with_its_client(config_dir, overrides, pair):
    assert targets(config_dir, *overrides) == pair


VARIANTS = ("fedavgm", "fedld_rate")  # FedAvg under other numbers
OF_THE_RUN = ("dp_fedavg",)  # its YAML takes the run's fraction


@pytest.mark.parametrize("name", strategy_names())
def test_yaml_lists_every_argument_with_its_default(name, config_dir):
    with initialize_config_dir(config_dir=config_dir, version_base="1.3"):
        composed = compose("main", overrides=[f"strategy={name}"])
        config = OmegaConf.to_container(composed.strategy, resolve=name in OF_THE_RUN)
    if name == "fedld_yoked":  # needs a recorded run
        assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(Yoked) if field.init}
        return
    rule = instantiate(config)
    listed = [field for field in dataclasses.fields(rule) if field.init]
    fields = {field.name for field in listed}
    assert fields == set(config) - {"_target_"}
    if name not in (*VARIANTS, *OF_THE_RUN):
        missing = dataclasses.MISSING
        required = {f.name for f in listed if f.default is missing and f.default_factory is missing}
        plain = type(rule)(**{f: getattr(rule, f) for f in required})
        own = fields - {"rule"}  # a wrapper's YAML may choose what it wraps
        assert {f: getattr(rule, f) for f in own} == {f: getattr(plain, f) for f in own}
