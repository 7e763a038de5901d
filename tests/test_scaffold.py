"""`fedsim new`: the package builds, its own tests pass, and its choice runs, inside any repository."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedsim import cli
from fedsim.errors import UserError
from fedsim.scaffold.package import KINDS, new

BUILD = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"


def python(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = (
        os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
        | ({} if path is None else {"PYTHONPATH": str(path)})
    )
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def install(folder: Path, site: Path) -> None:
    """Build the wheel as pip does, and unpack it."""
    pytest.importorskip("setuptools", reason="needs setuptools to build a wheel")
    done = python("-c", BUILD, str(site.parent), cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    (wheel,) = site.parent.glob(f"{folder.name.replace('-', '_')}*.whl")
    zipfile.ZipFile(wheel).extractall(site)


def test_new_packages_build_pass_their_tests_and_run(tmp_path):
    repository = tmp_path / "repository"
    for name in ("strategies", "clients", "configs"):  # a user's own, which must not get in the way
        (repository / name).mkdir(parents=True)
        (repository / name / "__init__.py").write_text("raise ImportError('a user's own folder was imported')")
    site = tmp_path / "site"
    made = [new(kind, f"my_{kind}", repository) for kind in KINDS]
    for package in made:
        install(package.folder, site)
    folders = [package.folder.name for package in made]
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    tests = python("-m", "pytest", *folders, *options, cwd=repository, path=site)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert re.search(r"^1[5-9] passed", tests.stdout, re.MULTILINE), tests.stdout  # 6 + 5 + 4 of the three templates
    choices = [package.choice for package in made]
    run = python("-m", "fedsim", "run", *choices, "num_rounds=1", "hydra.run.dir=run", cwd=repository, path=site)
    assert (run.returncode, run.stderr) == (0, "")
    assert (repository / "run" / "summary.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_to_fill_in_and_the_code_is_clean(kind, tmp_path):
    made = new(kind, "my_own", tmp_path)
    for file in made.files:
        text = (made.folder / file).read_text()
        for placeholder in ("<name>", "<class>", "<package>", "<kind>", "<project>", "<version>"):
            assert placeholder not in text + file
        if file.endswith(".py"):
            compile(text, file, "exec")
        assert max(map(len, text.splitlines())) <= 120
    assert "class MyOwn:" in (made.folder / "src" / "fedsim_my_own" / "my_own.py").read_text()


def test_the_command_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "strategy", "geo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["pip install -e fedsim-geo", "fedsim run strategy=geo", "pytest fedsim-geo"]
    assert all(Path(line).is_file() for line in lines[:-4])
    assert cli.main(["new", "strategy", "geo"]) == 2
    assert capsys.readouterr().err == "fedsim: fedsim-geo exists already\n"
    assert cli.main(["new", "strategy"]) == 2
    assert "takes a kind (strategy, client, partition) and a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("strategi", "x", "no such kind; did you mean 'strategy'"),
        ("strategy", "fedavg", "strategy=fedavg exists already"),
        ("strategy", "My-Rule", "small letters, digits and _ only, for example my_rule"),
        ("strategy", "../x", "for example x"),
        ("client", "class", "cannot be a choice's name"),
        ("client", "", "for example mine"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(kind, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        new(kind, name, tmp_path)
    assert not list(tmp_path.iterdir())
