"""The laws that a server rule keeps, and `check_strategy`, which runs them.

A new rule is tested by existing: tests/test_laws.py runs every law on every config of the group `strategy`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Rule, State, Sums
from fedsim.errors import did_you_mean
from fedsim.layout import Layout


def cohort_of(
    updates: npt.ArrayLike | Tensor,
    weights: npt.ArrayLike | Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    round: int = 1,
    **fields: Any,
) -> Cohort:
    """Return a cohort of clients 0 … K−1 that received one model and took one step each.

    Args:
        updates: (K, D) rows w_k − w_received.
        weights: (K,) n_k ≥ 0; None counts every client once.
        sizes: lengths of the layers, summing to D; None is one layer.
        round: the cohort's round, from 1.
        fields: any other field of `Cohort`, e.g. `staleness` or `extras`.

    Raises:
        ValueError: shapes that do not fit together.

    """
    rows = updates if isinstance(updates, Tensor) else torch.as_tensor(np.asarray(updates))
    if rows.dim() != 2:
        raise ValueError(f"updates must be (K, D), got shape {tuple(rows.shape)}; one row a client")
    rows = rows if rows.is_floating_point() else rows.double()
    count, size = rows.shape
    layout = Layout.vector([size] if sizes is None else sizes)
    if layout.size != size:
        raise ValueError(f"sizes must sum to D = {size}, got {layout.size}; give the length of every layer")
    n = torch.ones(count) if weights is None else torch.as_tensor(weights)
    if n.shape != (count,):
        raise ValueError(f"weights must be (K,) = ({count},), got shape {tuple(n.shape)}")
    zeros = torch.zeros(count, dtype=torch.int64)
    plain: dict[str, Any] = {
        "weights": n.to(rows.device, rows.dtype),
        "clients": torch.arange(count),
        "num_steps": zeros + 1,
        "staleness": zeros,
        "received": zeros + round - 1,
    }
    return Cohort(updates=rows, round=round, layout=layout, **{**plain, **fields})


def check_strategy(
    rule: Rule,
    *,
    laws: Collection[str] | None = None,
    num_clients: int = 9,
    sizes: Sequence[int] = (5, 1, 4),
    seed: int = 0,
) -> None:
    """Run the laws on a rule; say which failed and what to do about it.

    What every rule keeps: `pure` (inputs are left alone), `deterministic`, `shape`, `finite`, `state` (plain
    values that a checkpoint can hold), `metrics`, `precision` (float32 follows float64), `streaming` (a linear
    rule gives the same from sums), `permutation` (of the clients) and `weights` (only their ratios count).
    What means and selections keep beside, and adaptive or clipping rules do not: `unanimity` (rule of equal
    rows is that row), `homogeneity` rule(cU) = c rule(U), `translation` rule(U + c) = rule(U) + c.

    Args:
        rule: what to check.
        laws: which to run; None is those that every rule keeps.
        num_clients: K of the cohorts drawn, large enough for the rule.
        sizes: lengths of the layers.
        seed: of the cohorts drawn.

    Raises:
        AssertionError: a law does not hold; the message names it and the cure.
        ValueError: `laws` names one that there is not, or the rule needs more clients.

    """
    chosen = [name for name in LAWS if name not in NOT_UNIVERSAL] if laws is None else laws
    for name in chosen:
        if name not in LAWS:
            raise ValueError(f"no law {name!r}{did_you_mean(name, LAWS)}")
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_clients, sum(sizes))) + rng.normal(size=sum(sizes))  # (K, D)
    sizes_of = rng.integers(1, 50, num_clients)  # (K,)
    uploads = {name: torch.as_tensor(rng.normal(size=rows.shape)) for name in getattr(rule, "reduced_extras", ())}
    uploads |= {name: torch.as_tensor(rng.uniform(0.1, 3.0, num_clients)) for name in getattr(rule, "uploads", ())}
    cohort = cohort_of(rows, sizes_of, sizes=sizes, round=2, extras=uploads)
    if hasattr(rule, "check"):
        rule.check(num_clients)
    for name in chosen:
        LAWS[name](rule, cohort)


def _run(rule: Rule, cohort: Cohort, rounds: int = 1) -> tuple[Tensor, State, dict[str, Any]]:
    state = rule.init(cohort.layout, len(cohort))
    for number in range(rounds):
        delta, state, metrics = rule(replace(cohort, round=cohort.round + number), state)
    return delta, state, metrics


def _with(cohort: Cohort, updates: Tensor) -> Cohort:
    return replace(cohort, updates=updates, weights=cohort.weights.to(updates))


def _expect(law: str, holds: Any, cure: str) -> None:
    if not bool(holds):
        raise AssertionError(f"law {law!r}: {cure}")


def _same(law: str, got: Tensor, want: Tensor, cure: str, tolerance: float = 1e-8) -> None:
    scale = max(float(want.abs().max()) if want.numel() else 0.0, 1e-3)
    error = float((got - want).abs().max()) / scale if want.numel() else 0.0
    _expect(law, error <= tolerance, f"{cure} (relative error {error:.1e}, {tolerance:.0e} allowed)")


# In the order in which they are run: what would show as a fault of another kind comes first.


def _law_pure(rule: Rule, cohort: Cohort) -> None:
    state = rule.init(cohort.layout, len(cohort))
    _, state, _ = rule(cohort, state)
    copies = cohort.rows.clone(), cohort.weights.clone(), _clone(state)
    rule(replace(cohort, round=cohort.round + 1), state)
    _expect("pure", torch.equal(copies[0], cohort.rows), "the rule writes into the updates; copy before you change")
    _expect("pure", torch.equal(copies[1], cohort.weights), "the rule writes into the weights")
    _expect("pure", _equal(copies[2], state), "the rule writes into the state that it was given; return a new one")


def _law_deterministic(rule: Rule, cohort: Cohort) -> None:
    first, second = _run(rule, cohort)[0], _run(rule, cohort)[0]
    cure = "two calls differ; draw randomness from cohort.rng(purpose), and return what is remembered in the state"
    _expect("deterministic", torch.equal(first, second), cure)


def _law_shape(rule: Rule, cohort: Cohort) -> None:
    for updates in (cohort.rows, cohort.rows.float()):
        delta, _, _ = _run(rule, _with(cohort, updates))
        want = f"({cohort.layout.size},) {updates.dtype}"
        got = f"{tuple(delta.shape)} {delta.dtype}"
        _expect("shape", got == want, f"delta must be {want} as the updates, got {got}")


def _law_finite(rule: Rule, cohort: Cohort) -> None:
    hostile = cohort.rows.clone()
    hostile[0] *= 1e12
    for updates, what in (
        (cohort.rows, "random updates"),
        (torch.zeros_like(cohort.rows), "zero updates"),
        (cohort.rows[:1].expand_as(cohort.rows).contiguous(), "equal updates"),
        (cohort.rows * 1e-30, "tiny updates"),
        (hostile.float(), "one huge update"),
    ):
        delta, _, _ = _run(rule, _with(cohort, updates), rounds=2)
        _expect("finite", torch.isfinite(delta).all(), f"a NaN or an infinity from {what}; guard the division")


def _law_state(rule: Rule, cohort: Cohort) -> None:
    for state in (rule.init(cohort.layout, len(cohort)), _run(rule, cohort, rounds=2)[1]):
        _expect("state", _is_plain(state), "state must be nested dicts with string keys of tensors, numbers, strings")


def _law_metrics(rule: Rule, cohort: Cohort) -> None:
    for name, value in _run(rule, cohort)[2].items():
        _expect("metrics", isinstance(name, str), f"names must be strings, got {name!r}")
        is_number = isinstance(value, (Tensor, np.ndarray, np.generic, bool, int, float))
        _expect("metrics", is_number, f"{name} must be a number or (K,), got {value!r}")
        shape = tuple(torch.as_tensor(value).shape)
        _expect("metrics", shape in {(), (len(cohort),)}, f"{name} must be a number or (K,), got shape {shape}")


def _law_precision(rule: Rule, cohort: Cohort) -> None:
    single = _run(rule, _with(cohort, cohort.rows.float()))[0].double()
    # 1e-3: float32 rounding grows by the condition of spectra and of ratios of small norms
    _same("precision", single, _run(rule, cohort)[0], "float32 and float64 differ; sum in float64", 1e-3)


def _law_streaming(rule: Rule, cohort: Cohort) -> None:
    if not isinstance(rule, LinearRule) or getattr(rule, "needs_rows", False):
        return
    streamed = replace(cohort, updates=None)
    state = rule.init(cohort.layout, len(cohort))
    c = rule.coefficients(streamed, state)
    _expect("streaming", (c >= 0).all() and c.shape == cohort.weights.shape, "coefficients must be (K,) and >= 0")
    mean = sum(c[k] * cohort.rows[k] for k in range(len(cohort))) / c.sum()
    means = {name: cohort.extras[name].mean(0) for name in rule.reduced_extras}
    sums = Sums(streamed, c, cohort.rows.square().sum(1), means)
    delta, _, _ = rule.finish(torch.as_tensor(mean), sums, state)
    _same("streaming", delta, _run(rule, cohort)[0], "finish on streamed sums differs from the rule on the matrix")


def _law_permutation(rule: Rule, cohort: Cohort) -> None:
    order = torch.arange(len(cohort)).roll(2).flip(0)
    extras = {name: value[order] for name, value in cohort.extras.items()}
    turned = replace(cohort, updates=cohort.rows[order], weights=cohort.weights[order], extras=extras)
    _same("permutation", _run(rule, turned)[0], _run(rule, cohort)[0], "the result depends on the clients' order")


def _law_weights(rule: Rule, cohort: Cohort) -> None:
    scaled = replace(cohort, weights=7 * cohort.weights)
    _same("weights", _run(rule, scaled)[0], _run(rule, cohort)[0], "weights count beyond their ratios; normalise them")


def _law_unanimity(rule: Rule, cohort: Cohort) -> None:
    row = cohort.rows[0]
    got = _run(rule, _with(cohort, row.expand_as(cohort.rows).contiguous()))[0]
    _same("unanimity", got, row, "equal updates do not give that update", 1e-6)


def _law_homogeneity(rule: Rule, cohort: Cohort) -> None:
    got = _run(rule, _with(cohort, 3 * cohort.rows))[0]
    _same("homogeneity", got, 3 * _run(rule, cohort)[0], "rule(3 U) is not 3 rule(U)", 1e-6)


def _law_translation(rule: Rule, cohort: Cohort) -> None:
    shift = torch.linspace(-1, 2, cohort.layout.size, dtype=cohort.rows.dtype)
    got = _run(rule, _with(cohort, cohort.rows + shift))[0]
    _same("translation", got, _run(rule, cohort)[0] + shift, "rule(U + c) is not rule(U) + c", 1e-6)


NOT_UNIVERSAL = ("unanimity", "homogeneity", "translation")

LAWS: dict[str, Callable[[Rule, Cohort], None]] = {
    name.removeprefix("_law_"): law for name, law in list(globals().items()) if name.startswith("_law_")
}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, (Tensor, bool, int, float, str))


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
