"""Would the tests notice? Breaks the code in one place at a time, in a copy of the tree, and runs the tests there.

    python -m benchmarks.mutations [--list] [--output FILE] [NAME …]      names: some alone; none: all

Not part of a test run: each mutation has a pytest of its own, which stops at the first failure; that
test must pass once the line is right again. What survives is a missing test, or a mutation that changes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import flwr.app  # noqa: F401  slow to load, as the three below
import omegaconf  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401

from benchmarks.mutated import MUTATIONS

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("fedsim", "strategies", "clients", "configs", "tests", "benchmarks", "docs")
INSIDE = ("strategies", "clients", "configs")  # imported as fedsim.strategies and so on


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutation's name")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    parser.add_argument("--output", type=Path, help="Markdown table, written as it grows")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.names or any(name in m.name for name in given.names)]
    if given.list:
        print(*(m.name for m in chosen), sep="\n")
        return
    lines = ["| mutation | file | result | by |", "|---|---|---|---|"]
    caught = 0
    right: set[str] = set()  # tests that pass on the right tree
    with tempfile.TemporaryDirectory() as place:
        tree = copied(Path(place) / "tree")
        print(*lines, sep="\n", flush=True)
        for mutation in chosen:
            path = tree / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.right) != 1:
                sys.exit(f"{mutation.name}: {mutation.file} has {text.count(mutation.right)} times {mutation.right!r}")
            path.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
            code, by, seconds = tested(tree, mutation.tests)
            path.write_text(text, encoding="utf-8")
            result = {0: "**survived**", 1: "caught"}.get(code, f"**pytest ended with {code}**")
            if code == 1 and by not in right and tested(tree, (by,))[0]:
                result = "**the test fails without it, too**"
            elif code == 1:
                right.add(by)
            caught += result == "caught"
            lines.append(f"| {mutation.name} | `{mutation.file}` | {result} | `{by.partition('[')[0]}` |")
            print(lines[-1], f"{seconds:.0f} s", flush=True)
            if given.output:
                given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{caught} of {len(chosen)} caught")


def copied(tree: Path) -> Path:
    """Copy the tree, laid out as it is imported."""
    tree.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in INSIDE:
        (tree / "fedsim" / part).symlink_to(tree / part, target_is_directory=True)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tree)
    return tree


def tested(tree: Path, files: tuple[str, ...]) -> tuple[int, str, float]:
    """Run test files of the tree up to the first failure; return pytest's code, which test failed, and seconds.

    In a fork of this process, which has loaded what is slow to load; fedsim is loaded anew, from the tree.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if child == 0:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            os.chdir(tree)
            os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
            sys.dont_write_bytecode = True
            for name in [name for name in sys.modules if name.partition(".")[0] in ("fedsim", "benchmarks")]:
                del sys.modules[name]
            options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "--rootdir", str(tree)]
            os._exit(pytest.main([*options, *(f"tests/{file}" for file in files)]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        output = told.read()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)
    by = failed[1] if failed else "" if code == 0 else output[-200:].replace("\n", " ")
    return code, by, time.perf_counter() - began


if __name__ == "__main__":
    main()
