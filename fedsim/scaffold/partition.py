"""The files of `fedsim new partition`; `<name>`, `<class>`, `<package>` … are filled in."""

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

FILES = {
    "src/<package>/<name>.py": _PARTITIONER,
    "src/<package>/configs/partition/<name>.yaml": _PARTITIONER_YAML,
    "tests/test_<name>.py": _PARTITIONER_TEST,
}
