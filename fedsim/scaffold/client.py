"""The files of `fedsim new client`; `<name>`, `<class>`, `<package>` … are filled in."""

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

FILES = {
    "src/<package>/<name>.py": _OBJECTIVE,
    "src/<package>/configs/client/<name>.yaml": _OBJECTIVE_YAML,
    "tests/test_<name>.py": _OBJECTIVE_TEST,
}
