"""Wheels for a machine without a package index: `python -m benchmarks.wheels DIR --python 3.12`.

Everything that fedsim and `make gpu` import but torch, which such a machine brings along with its own CUDA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("pytest>=8",)  # what the files that `make gpu` runs import beside fedsim
OWN = "torch"
SOURCES = ("antlr4-python3-runtime==4.9.3",)  # of omegaconf and Hydra: pure Python, published without a wheel


def wanted() -> list[str]:
    """Return the requirements, the package's own, the tests' and what builds it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"], *TESTS]
    pinned = [
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ]
    exact = {_name(line): line for line in pinned if line}
    return [exact.get(_name(line), line) for line in needed if _name(line) != OWN]


def command(folder: Path, python: str, platforms: list[str]) -> list[str]:
    """Return pip's arguments.

    Args:
        folder: where the wheels go.
        python: version of the other machine, e.g. 3.12.
        platforms: tags that it accepts.

    """
    tags = [argument for platform in platforms for argument in ("--platform", platform)]
    return [
        "download", "--dest", str(folder), "--find-links", str(folder), "--only-binary=:all:",
        "--implementation", "cp", "--python-version", python,
        *tags, *wanted(),
    ]  # fmt: skip


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower()


def main() -> None:
    """Download them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine")
    parser.add_argument(
        "--platform", nargs="+", default=["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"],
        help="tags that it accepts",
    )  # fmt: skip
    given = parser.parse_args()
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(given.folder), *SOURCES], check=True)
    subprocess.run([*pip, *command(given.folder, given.python, given.platform)], check=True)


if __name__ == "__main__":
    main()
