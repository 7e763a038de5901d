"""The files of `fedsim new strategy`; `<name>`, `<class>`, `<package>` … are filled in."""

_RULE = '''\
r"""<class>: what it does, in one line.

Authors, VENUE YEAR, eq. N. https://arxiv.org/abs/…
    delta = server_lr \\sum_k (n_k / n) (w_k - w)
Departs from the paper: say where, and why.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import combine, proportions


@dataclass(frozen=True, kw_only=True)
class <class>:
    """<class>'s rule on the updates of a cohort.

    A rule that is a weighted mean of updates does better to extend `fedsim.contracts.LinearRule`: then the updates
    are summed as they come, and no matrix is held.

    Args:
        server_lr: factor > 0 on the step; 1 is FedAvg.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(<class>(), [[1.0, 0.0], [0.0, 4.0]], weights=[3, 1])
    array([0.75, 1.  ])

    """

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        if not self.server_lr > 0:
            raise ValueError(f"<class> needs server_lr > 0, got {self.server_lr}; 1 is FedAvg")

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the memory before round 1: nested dicts of tensors and numbers, which checkpoints store."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step (D,), the new memory, and figures for rounds.jsonl."""
        updates = cohort.rows  # (K, D)
        share = proportions(cohort.weights).to(updates.device)  # (K,)
        delta = self.server_lr * combine(share, updates)  # (D,)
        return delta, state, {}
'''

_RULE_YAML = """\
# One line that says what it is. Paper (Authors, VENUE YEAR), eq. N.
_target_: <package>.<name>.<class>
server_lr: 1.0   # factor > 0 on the step; 1 is FedAvg
"""

_RULE_TEST = '''\
"""<class>: its laws, a case by hand, its limit, and a run."""

import doctest
import importlib

import numpy as np
import pytest

import fedsim
from fedsim.testing import apply_rule, build_rule, check_strategy


def test_the_laws():
    check_strategy(build_rule("<name>"))


def test_by_hand():
    # Clients with 3 and 1 samples: (3/4) (1, 0) + (1/4) (0, 4) = (0.75, 1); half of it at server_lr 0.5.
    rule = build_rule("<name>", server_lr=0.5)
    assert apply_rule(rule, [[1.0, 0.0], [0.0, 4.0]], weights=[3, 1]).tolist() == [0.375, 0.5]


def test_limit_fedavg():
    updates = np.random.default_rng(0).normal(size=(5, 7))
    expected = apply_rule(build_rule("fedavg"), updates, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(apply_rule(build_rule("<name>"), updates, [1, 2, 3, 4, 5]), expected, rtol=1e-12)


def test_a_wrong_argument_is_named():
    with pytest.raises(ValueError, match="server_lr"):
        build_rule("<name>", server_lr=0.0)


def test_the_example_in_the_docstring():
    assert doctest.testmod(importlib.import_module("<package>.<name>")).failed == 0


def test_a_run(tmp_path):
    result = fedsim.simulate("strategy=<name>", num_rounds=2, folder=tmp_path / "run")
    assert result.summary["status"] == "done"
'''

FILES = {
    "src/<package>/<name>.py": _RULE,
    "src/<package>/configs/strategy/<name>.yaml": _RULE_YAML,
    "tests/test_<name>.py": _RULE_TEST,
}
