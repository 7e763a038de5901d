"""Mutations that the tests must notice can be made: each text stands in its file, and once."""

from pathlib import Path

import pytest

from benchmarks.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_can_be_made(mutation):
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.right) == 1
