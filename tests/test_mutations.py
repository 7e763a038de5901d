"""Mutations that the tests must notice can be made: each text stands in its file, and once."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_is_tested_is_the_tree(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    mutations = importlib.import_module("benchmarks.mutations")
    (tmp_path / "tests").mkdir()
    for package in ("fedsim", "benchmarks"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("here = True\n")
        (tmp_path / "tests" / f"test_{package}.py").write_text(
            f"import {package}\ndef test_it():\n    assert not hasattr({package}, 'here')\n"
        )
    for package in ("fedsim", "benchmarks"):
        code, _, _ = mutations.tested(tmp_path, (f"test_{package}.py",))
        assert code == 1


def test_every_mutation_can_be_made(monkeypatch):
    monkeypatch.syspath_prepend(
        str(ROOT)
    )  # benchmarks/ is run from the repository's root and is no part of the package
    mutations = importlib.import_module("benchmarks.mutations").MUTATIONS
    times = {m.name: (ROOT / m.file).read_text(encoding="utf-8").count(m.right) for m in mutations}
    assert len(times) == len(mutations) >= 50
    assert {name: count for name, count in times.items() if count != 1} == {}
