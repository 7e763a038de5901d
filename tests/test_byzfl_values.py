"""Rules, pre-aggregators and closed-form attacks against ByzFL 0.0.11, through a table of values.

The table is written by benchmarks/byzfl_values.py. Where ByzFL departs from the papers the arguments say so: its Krum
counts n − f − 1 neighbours instead of n − f − 2, which is ours told f − 1; its ALIE adds instead of subtracts and takes
the unbiased deviation; its sign flip turns the honest mean, which is IPM with ε = 1; its geometric median starts
at 0 instead of the mean, so that both run until they stand still. Both sides are float64: 1e-9.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.attacks.alie import ALIE
from fedsim.attacks.contract import View
from fedsim.attacks.ipm import IPM
from fedsim.laws import cohort_of
from fedsim.strategies.arc import ARC
from fedsim.strategies.centered_clipping import CenteredClipping
from fedsim.strategies.clip import Clip
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.geometric_median import GeometricMedian
from fedsim.strategies.krum import Krum, MultiKrum
from fedsim.strategies.meamed import MeaMed
from fedsim.strategies.median import Median
from fedsim.strategies.nnm import NNM
from fedsim.strategies.trimmed_mean import TrimmedMean
from fedsim.testing import apply_rule

CASES = json.loads(Path(__file__).with_name("byzfl_values.json").read_text(encoding="utf-8"))["cases"]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['rows'])}x{len(case['rows'][0])}")

RULES = {
    "average": lambda f, n: FedAvg(),
    "median": lambda f, n: Median(),
    "trimmed_mean": lambda f, n: TrimmedMean(num_byzantine=f),
    "geometric_median": lambda f, n: GeometricMedian(num_iterations=5000, smoothing=1e-6),
    "krum": lambda f, n: Krum(num_byzantine=f - 1),
    "multi_krum": lambda f, n: MultiKrum(num_byzantine=f - 1, num_selected=n - f),
    "centered_clipping": lambda f, n: CenteredClipping(radius=1.5, num_iterations=3, start="zero"),
    "meamed": lambda f, n: MeaMed(num_byzantine=f),
}
PRE_AGGREGATORS = {
    "nnm": lambda f: NNM(num_byzantine=f),
    "clip": lambda f: Clip(max_norm=2.0),
    "arc": lambda f: ARC(num_byzantine=f),
}


@EACH_CASE
@pytest.mark.parametrize("name", RULES)
def test_rules(case, name):
    rows = np.array(case["rows"])
    got = apply_rule(RULES[name](case["f"], len(rows)), rows)
    np.testing.assert_allclose(got, case["values"][name], rtol=1e-9, atol=1e-12)


@EACH_CASE
@pytest.mark.parametrize("name", PRE_AGGREGATORS)
def test_pre_aggregators(case, name):
    mixed, _ = PRE_AGGREGATORS[name](case["f"]).mix(cohort_of(case["rows"]))
    np.testing.assert_allclose(mixed.rows, case["values"][name], rtol=1e-9, atol=1e-12)


@EACH_CASE
def test_attacks(case):
    honest = np.array(case["rows"])
    count = len(honest)
    rows = np.concatenate([honest, np.zeros((2, honest.shape[1]))])
    view = View(cohort=cohort_of(rows), byzantine=torch.arange(count + 2) >= count)
    biased = 1.5 * np.sqrt(count / (count - 1))
    for name, attack in (("sign_flipping", IPM(epsilon=1.0)), ("ipm", IPM(epsilon=2.0)), ("alie", ALIE(z=-biased))):
        want = [case["values"][name]] * 2
        np.testing.assert_allclose(attack.rows(view, {})[0], want, rtol=1e-9, atol=1e-12)
