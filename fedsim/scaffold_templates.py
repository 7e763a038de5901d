"""The files that `fedsim new` writes; `<name>`, `<class>`, `<package>` … are filled in."""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "<project>"
version = "0.1.0"
description = "<kind>=<name> for fedsim"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["fedsim>=<version>"]

[project.optional-dependencies]
dev = ["pytest>=8"]

[project.entry-points."fedsim.plugins"]
<name> = "<package>.configs"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
"*" = ["*.yaml"]

[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = "--import-mode=importlib"
"""

README = """\
# <project>

`<kind>=<name>` for fedsim: one sentence that says what it does, and its paper.

```
pip install -e .              # in this folder; from then on every `fedsim` command knows it
fedsim list <kind>
fedsim run <kind>=<name>
pip install -e '.[dev]' && pytest
```

| File | What it is |
|---|---|
| `src/<package>/<name>.py` | the method |
| `src/<package>/configs/<kind>/<name>.yaml` | its arguments and defaults; `fedsim list` shows its first line |
| `tests/test_<name>.py` | its laws, a case by hand, and a run |
| `pyproject.toml` | the entry point `fedsim.plugins`, by which fedsim finds the YAML |

Further choices, of this or any other group, are further YAML files under `src/<package>/configs/`.
"""

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

STRATEGY = {
    "src/<package>/<name>.py": _RULE,
    "src/<package>/configs/strategy/<name>.yaml": _RULE_YAML,
    "tests/test_<name>.py": _RULE_TEST,
}

_OBJECTIVE = '''\
r"""<class>: what it does, in one line.

Authors, VENUE YEAR, eq. N. https://arxiv.org/abs/…
    L = -\\sum_c ((1 - s) [c = y] + s / C) log softmax(z)_c
Departs from the paper: say where, and why.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class <class>:
    """<class>'s client objective.

    `fedsim.contracts.Objective` says what else an objective may have: a state of its own, a second upload, phases.

    Args:
        smoothing: s in [0, 1); 0 is cross-entropy.

    Raises:
        ValueError: an argument out of its range.

    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"<class> needs 0 <= smoothing < 1, got {self.smoothing}; 0 is cross-entropy")

    def criterion(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss (…) of logits (…, B, C), targets (…, B) and weights (…, B): 1/b, and 0 for padding.

        Only the batch axis is reduced: leading axes are clients, so that a cohort runs as one program.
        """
        logs = logits.log_softmax(-1)  # (…, B, C)
        right = logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (…, B)
        losses = -(1 - self.smoothing) * right - self.smoothing * logs.mean(-1)  # (…, B)
        return (weights * losses).sum(-1)  # (…)
'''

_OBJECTIVE_YAML = """\
# One line that says what it is. Paper (Authors, VENUE YEAR), eq. N.
defaults: [_training, _self_]
_target_: <package>.<name>.<class>
smoothing: 0.1   # in [0, 1); 0 is cross-entropy
"""

_OBJECTIVE_TEST = '''\
"""<class>: a case by hand, its limit, and a run."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import fedsim
from fedsim.testing import check_client
from <package>.<name> import <class>


def loss(objective, logits, targets):
    weights = torch.full(targets.shape, 1 / targets.shape[-1], dtype=logits.dtype)
    return objective.criterion(logits, targets, weights)


def test_by_hand():
    # softmax(log 3, 0) = (3/4, 1/4); smoothing 0.5 puts 3/4 on the label and 1/4 on the other class.
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss(<class>(smoothing=0.5), logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-12)


def test_the_laws():
    check_client(<class>())


def test_limit_cross_entropy():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(loss(<class>(smoothing=0.0), logits, targets), cross_entropy(logits, targets))


def test_leading_axes_are_clients():
    logits = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(18).reshape(3, 6) % 4
    together = loss(<class>(), logits, targets)
    torch.testing.assert_close(together, torch.stack([loss(<class>(), z, y) for z, y in zip(logits, targets)]))


def test_a_wrong_argument_is_named():
    with pytest.raises(ValueError, match="smoothing"):
        <class>(smoothing=1.0)


def test_a_run(tmp_path):
    result = fedsim.simulate("client=<name>", num_rounds=2, folder=tmp_path / "run")
    assert result.summary["status"] == "done"
'''

CLIENT = {
    "src/<package>/<name>.py": _OBJECTIVE,
    "src/<package>/configs/client/<name>.yaml": _OBJECTIVE_YAML,
    "tests/test_<name>.py": _OBJECTIVE_TEST,
}

_PARTITIONER = '''\
r"""<class>: who gets which samples, in one line.

Authors, VENUE YEAR, section N. https://arxiv.org/abs/…
Departs from the paper: say where, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.contracts import Partition

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class <class>:
    """Shuffles the samples and cuts them into equal parts.

    Args:
        num_clients: >= 1.

    Raises:
        ValueError: an argument out of its range, or more clients than samples.

    """

    num_clients: int = 20

    def __post_init__(self) -> None:
        if self.num_clients < 1:
            raise ValueError(f"num_clients must be >= 1, got {self.num_clients}")

    def __call__(self, labels: Ints, rng: np.random.Generator, natural: Ints | None = None) -> Partition:
        """Return a partition of range(N) from labels (N,); all randomness comes from `rng`."""
        if self.num_clients > len(labels):
            raise ValueError(f"{self.num_clients} clients cannot share {len(labels)} samples; lower num_clients")
        offsets = np.arange(self.num_clients + 1) * len(labels) // self.num_clients  # (K+1,)
        return Partition(rng.permutation(len(labels)), offsets)
'''

_PARTITIONER_YAML = """\
# One line that says what it is. Paper (Authors, VENUE YEAR), section N.
defaults: [_shared, _self_]
_target_: <package>.<name>.<class>
num_clients: 20   # >= 1
"""

_PARTITIONER_TEST = '''\
"""<class>: every sample once, equal draws from equal seeds, and a run."""

import numpy as np
import pytest

import fedsim
from <package>.<name> import <class>

LABELS = np.arange(103) % 5


@pytest.mark.parametrize("num_clients", [1, 7, 103])
def test_every_sample_is_given_once(num_clients):
    drawn = <class>(num_clients=num_clients)(LABELS, np.random.default_rng(0))
    assert sorted(drawn.indices) == list(range(103))
    assert drawn.num_clients == num_clients
    assert drawn.sizes.max() - drawn.sizes.min() <= 1


def test_a_draw_is_a_function_of_its_generator():
    first, again, other = (<class>()(LABELS, np.random.default_rng(seed)).indices for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="num_clients must be >= 1"):
        <class>(num_clients=0)
    with pytest.raises(ValueError, match="cannot share 103 samples"):
        <class>(num_clients=104)(LABELS, np.random.default_rng(0))


def test_a_run(tmp_path):
    result = fedsim.simulate("partition=<name>", num_rounds=2, folder=tmp_path / "run")
    assert result.summary["status"] == "done"
'''

PARTITION = {
    "src/<package>/<name>.py": _PARTITIONER,
    "src/<package>/configs/partition/<name>.yaml": _PARTITIONER_YAML,
    "tests/test_<name>.py": _PARTITIONER_TEST,
}
