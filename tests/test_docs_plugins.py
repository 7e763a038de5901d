"""docs/plugins.md, line by line: its files are written, its commands run, what it shows is what comes."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DOC = Path(__file__).resolve().parent.parent / "docs" / "plugins.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BUILD = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"


def python(*words: str, cwd: Path, site: Path) -> str:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(site),
        "COLUMNS": "100",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    return done.stdout


def execute(command: str, cwd: Path, site: Path) -> str:
    match shlex.split(command):
        case ["pip", "install", "-e", folder]:  # as pip does: build a wheel, unpack it
            python("-c", BUILD, str(site.parent), cwd=cwd / folder, site=site)
            (wheel,) = site.parent.glob("*.whl")
            zipfile.ZipFile(wheel).extractall(site)
            return ""
        case ["pytest", *words]:
            return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *words, cwd=cwd, site=site) and ""
        case ["fedsim", *words]:
            return python("-m", "fedsim", *words, cwd=cwd, site=site)
    raise AssertionError(f"no such command is executed here: {command}")


def test_the_walk_through(tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools to build a wheel")
    here, site = tmp_path / "here", tmp_path / "site"
    here.mkdir()
    blocks = BLOCK.findall(DOC.read_text(encoding="utf-8"))
    assert [kind for kind, _, _ in blocks] == [
        "console",
        "toml",
        "python",
        "python",
        "yaml",
        "yaml",
        "python",
        "console",
    ]
    for kind, path, text in blocks:
        if kind == "toml":
            assert text in (here / "fedsim-steady" / "pyproject.toml").read_text()
        elif kind == "console":
            commands = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
            for command, _, shown in (part.partition("\n") for part in commands):
                out = [" ".join(line.split()) for line in execute(command, here, site).splitlines()]
                for line in shown.splitlines():
                    assert " ".join(line.split()) in out, f"{command} does not show {line!r}"
        else:
            (here / path).parent.mkdir(parents=True, exist_ok=True)
            (here / path).write_text(text, encoding="utf-8")
    assert (here / "run" / "report.html").is_file()
    assert "head norm" in (here / "run" / "report.html").read_text()  # the second upload, a number for each client
