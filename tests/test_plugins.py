"""Third parties' packages: found without importing them, listed with their origin, never in anybody's way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import catalogue, cli, plugins
from fedsim.config import compose, instantiate
from fedsim.errors import UserError
from fedsim.testing import build_rule, check_strategy, strategy_names

RULE = """
from dataclasses import dataclass
from fedsim.contracts import LinearRule

@dataclass(frozen=True, kw_only=True)
class Geo(LinearRule):
    factor: float = 1.0
"""
GEO = "# Geometric something. Me et al., ICML 2030.\n_target_: q6geofed.rule.Geo\nfactor: 1.0  # any\n"


def install(site: Path, name: str, entry: str, choices: dict[str, str], code: str = "") -> None:
    """Lay a package and its metadata out as pip does."""
    package = site / name
    for choice, text in choices.items():
        path = package / "configs" / f"{choice}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(code)
    (package / "rule.py").write_text(RULE)
    info = site / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[fedsim.plugins]\n{name} = {entry}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "it's a site, äß"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    plugins.installed.cache_clear()
    yield folder
    plugins.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("q6")]:
        del sys.modules[name]


@pytest.fixture
def geofed(site):
    install(site, "q6geofed", "q6geofed.configs", {"strategy/geo": GEO, "strategy/_part": "a: 1\n"})
    return site


def test_a_choice_composes_builds_and_keeps_the_laws(geofed):
    config = compose(["strategy=geo", "strategy.factor=2.5"])
    assert instantiate(config.strategy).factor == 2.5
    check_strategy(build_rule("geo", factor=3.0))
    with pytest.raises(UserError, match="strategy=geo has no setting 'factr'; did you mean 'factor'"):
        compose(["strategy=geo", "strategy.factr=1"])
    assert "geo" not in strategy_names()  # fedsim's own


def test_it_is_listed_helped_and_suggested_with_its_origin(geofed, capsys):
    (entry,) = (entry for entry in catalogue.entries("strategy") if entry.name == "geo")
    assert entry == catalogue.Entry("geo", "Geometric something.", "Me et al., ICML 2030.", "q6geofed 1.2")
    assert cli.main(["list", "strategy"]) == 0
    listed = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(listed) if line.split()[:1] == ["geo"])
    assert listed[start + 2].split() == ["plug-in", "q6geofed", "1.2"]
    for words in (["--help"], ["run", "--help"]):
        assert cli.main(words) == 0
        assert "plug-ins:\n  q6geofed 1.2: strategy=geo\n" in capsys.readouterr().out
    assert cli.main(["config", "strategy=goe"]) == 2
    assert "did you mean 'geo'? It comes from the plug-in q6geofed 1.2" in capsys.readouterr().err


def test_a_new_group_is_a_group_too(site):
    install(site, "q6new", "q6new.configs", {"weather/rain": "# Wet.\n_target_: null\n"})
    assert "weather" in catalogue.groups(catalogue.roots())


def test_nothing_of_it_is_imported_to_list_it(site, capsys):
    install(site, "q6loud", "q6loud.configs", {"strategy/loud": GEO}, code="raise RuntimeError('imported')")
    assert cli.main(["list", "strategy"]) == 0
    out, err = capsys.readouterr()
    assert "loud" in out
    assert err == ""
    config = compose(["strategy=loud", "strategy._target_=q6loud.rule.Geo"])
    with pytest.raises(UserError, match="cannot be imported: RuntimeError: imported"):
        instantiate(config.strategy)


@pytest.mark.parametrize(
    ("entry", "choices", "reason"),
    [
        ("q6nowhere.configs", {}, "no module named 'q6nowhere'"),
        ("q6broken.settings", {"strategy/x": GEO}, "q6broken.settings is no folder of the package q6broken"),
        ("q6broken.configs", {"note": "a: 1\n"}, "holds no choices such as strategy/name.yaml"),
    ],
)
def test_a_broken_one_is_one_warning_with_its_name(site, geofed, capsys, entry, choices, reason):
    install(site, "q6broken", entry, choices)
    assert cli.main(["config", "strategy=geo"]) == 0  # the others work
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("warning: plug-in q6broken (q6broken 1.2) is broken and left out: ")
    assert reason in err


def test_a_name_that_is_taken_is_said_and_keeps_its_owner(site, geofed, capsys):
    install(site, "q6late", "q6late.configs", {"strategy/fedavg": GEO, "strategy/geo": GEO})
    assert cli.main(["config", "strategy=fedavg"]) == 0
    out, err = capsys.readouterr()
    assert "fedsim.strategies.fedavg.FedAvg" in out
    assert "plug-in q6late (q6late 1.2): strategy=fedavg is fedsim's own; that one is taken\n" in err
    assert "plug-in q6late (q6late 1.2): strategy=geo is q6geofed 1.2's own; that one is taken\n" in err


def test_the_users_folder_comes_before_a_plug_in(geofed, tmp_path):
    mine = tmp_path / "mine"
    (mine / "strategy").mkdir(parents=True)
    (mine / "strategy" / "geo.yaml").write_text(GEO.replace("factor: 1.0", "factor: 7.0"))
    assert compose(["strategy=geo"], config_dir=mine).strategy.factor == 7.0


def test_a_run_of_it_is_a_run(geofed, tmp_path):
    """In a process of its own, inside a repository that has its own folders of fedsim's names."""
    repository = tmp_path / "repository"
    for name in ("strategies", "clients", "configs", "fedsim_runs"):
        (repository / name).mkdir(parents=True)
        (repository / name / "__init__.py").write_text("raise ImportError('a user's own folder was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "run", "strategy=geo", "num_rounds=1", "hydra.run.dir=run"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(geofed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (repository / "run" / "summary.json").is_file()
