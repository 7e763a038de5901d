"""Laws over every config in configs/strategy: a new rule is tested by existing."""

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts import LinearRule
from fedsim.errors import UserError
from fedsim.laws import LAWS, check_strategy, cohort_of
from fedsim.testing import build_rule, strategy_names

ADAPTIVE = "divides by the updates' own size, coordinate by coordinate"
EQUIVARIANCES = ("unanimity", "homogeneity", "translation")

# The laws that a rule does not keep by its nature, with the reason.
EXEMPT = {
    "fedadagrad": dict.fromkeys(EQUIVARIANCES, ADAPTIVE),
    "fedadam": dict.fromkeys(EQUIVARIANCES, ADAPTIVE),
    "fedyogi": dict.fromkeys(EQUIVARIANCES, ADAPTIVE),
    "local": dict.fromkeys(("unanimity", "translation"), "it averages nothing"),
    "centered_clipping": dict.fromkeys(EQUIVARIANCES, "its radius has the unit of the updates, its start is fixed"),
    "norm_clipping": dict.fromkeys(EQUIVARIANCES, "its bound has the unit of the updates and is taken from the origin"),
    "clip": dict.fromkeys(EQUIVARIANCES, "its bound has the unit of the updates and is taken from the origin"),
    "dp_fedavg": dict.fromkeys(EQUIVARIANCES, "it clips towards the origin and adds noise"),
    "arc": {"translation": "it clips towards the origin"},
    "bucketing": {"permutation": "its buckets are drawn by position, as the paper's are"},
    "feddyn": dict.fromkeys(("unanimity", "translation"), "it takes its drift term off the mean"),
    "fedexp": dict.fromkeys(("homogeneity", "translation"), "its rate compares norms with each other and with epsilon"),
    "qfedavg": dict.fromkeys(EQUIVARIANCES, "its step shrinks by the clients' losses and the squares of their updates"),
    "fedlex": dict.fromkeys(("unanimity", "translation"), "its first round explores and moves nothing"),
    "step_decay": dict.fromkeys(("unanimity", "translation"), "it shortens the mean"),
    "fedasync": dict.fromkeys(("unanimity", "translation"), "it goes only a part of the way to the clients' models"),
    "flag": {"translation": "its subspace passes through the origin"},
    "fedld_random": dict.fromkeys(("permutation", "translation"), "its directions are drawn by the clients' positions"),
    "fedld_rate": dict.fromkeys(("unanimity", "translation"), "its default rate halves the mean"),
    "fedld_yoked": dict.fromkeys(EQUIVARIANCES, "its lengths are those of a recorded run"),
    "fedld": {"translation": "its directions and norms are taken from the origin"},
}


@cache
def recorded():
    """A run folder that `fedld_yoked` can read."""
    folder = Path(tempfile.mkdtemp())
    rows = [{"round": t, "step_norm": 0.5 * t, "mean_norm": 1.0} for t in range(1, 6)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    atexit.register(shutil.rmtree, folder)
    return str(folder)


@cache
def built(name):
    return build_rule(name, **({"run": recorded()} if name == "fedld_yoked" else {}))


@pytest.mark.parametrize("name", strategy_names())
@settings(derandomize=True, deadline=None, max_examples=5)
@given(
    seed=st.integers(0, 2**31 - 1),
    num_clients=st.integers(7, 12),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_every_strategy_keeps_the_laws(name, seed, num_clients, sizes):
    check_strategy(
        built(name),
        laws=[law for law in LAWS if law not in EXEMPT.get(name, {})],
        num_clients=num_clients,
        sizes=sizes,
        seed=seed,
    )


def test_what_rules_record_is_explained(pytestconfig):
    explained = (pytestconfig.rootpath / "docs/metrics.md").read_text(encoding="utf-8")
    unknown = set()
    for name in strategy_names():
        rule, rows = built(name), torch.linspace(-1, 2, 90).reshape(9, 10).double().sin()
        extras = dict.fromkeys(getattr(rule, "reduced_extras", ()), rows)
        extras |= dict.fromkeys(getattr(rule, "uploads", ()), torch.ones(9))
        cohort = cohort_of(rows, round=2, extras=extras)
        state = rule.init(cohort.layout, 9)
        for _ in range(2):
            _, state, metrics = rule(cohort, state)
            unknown |= {f"{name}: {metric}" for metric in metrics if f"`{metric}`" not in explained}
    assert sorted(unknown) == []


@pytest.mark.parametrize("name", EXEMPT)
def test_every_exemption_is_needed(name):
    for law in EXEMPT[name]:
        with pytest.raises(AssertionError, match=f"law '{law}'"):
            check_strategy(built(name), laws=[law])


@dataclass(frozen=True)
class Broken:
    """The mean, but for one fault."""

    fault: str

    def init(self, layout, num_clients):
        return {"history": []} if self.fault == "state" else {"calls": torch.zeros(1)}

    def __call__(self, cohort, state):
        updates, weights = cohort.rows, cohort.weights
        delta = weights @ updates / (1.0 if self.fault == "weights" else weights.sum())
        match self.fault:
            case "shape":
                delta = delta[:-1]
            case "finite":
                delta = delta * updates.norm() / updates.norm()
            case "deterministic":
                delta = delta + torch.rand(())
            case "pure":
                state["calls"] += 1
            case "permutation":
                delta = delta + updates[0]
            case "unanimity":
                delta = 2 * delta
            case "homogeneity":
                delta = delta.clamp(-1, 1)
            case "translation":
                delta = delta * updates.var()
            case "precision":
                delta = delta.bfloat16().to(delta) if delta.dtype == torch.float32 else delta
        metrics = {"norms": torch.zeros(2)} if self.fault == "metrics" else {}
        return delta, state, metrics


@dataclass(frozen=True)
class BrokenLinear(LinearRule):
    def coefficients(self, cohort, state):
        return cohort.weights if cohort.updates is None else torch.ones_like(cohort.weights)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "streaming"])
def test_a_rule_with_a_fault_fails_its_law(law):
    with pytest.raises(AssertionError, match=f"law '{law}'"):
        check_strategy(Broken(law), laws=[law])


class Remembering(Broken):
    """Keeps its calls in itself."""

    calls = 0

    def __call__(self, cohort, state):
        type(self).calls += 1
        return self.calls * cohort.rows.mean(0), state, {}


class Naming(Broken):
    def __call__(self, cohort, state):
        return cohort.rows.mean(0), state, {"winner": "client 3"}


class Overwriting(Broken):
    def __call__(self, cohort, state):
        return cohort.rows.mul_(2).mean(0), state, {}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Remembering("none"), "law 'deterministic': two calls differ; .* return what is remembered in the state"),
        (Naming("none"), "law 'metrics': winner must be a number or .K,., got 'client 3'"),
        (Overwriting("none"), "law 'pure': the rule writes into the updates; copy before you change"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_laws_together_name_the_fault_itself(rule, said):
    with pytest.raises(AssertionError, match=said):
        check_strategy(rule)


def test_a_linear_rule_that_looks_at_rows_fails_streaming():
    with pytest.raises(AssertionError, match="law 'streaming'"):
        check_strategy(BrokenLinear())


def test_a_wrong_name_is_told_the_nearest():
    with pytest.raises(UserError, match="no strategy 'fedlb'; did you mean 'fedld'"):
        build_rule("fedlb")
    with pytest.raises(UserError, match="no argument 'k_proportions'; did you mean 'k_proportion'"):
        build_rule("fedld", k_proportions=1)
    with pytest.raises(ValueError, match="no law 'translations'; did you mean 'translation'"):
        check_strategy(build_rule("fedavg"), laws=["translations"])
