"""The command line: verbs, help, exit codes, and how little a start costs."""

import importlib
import inspect
import os
import shlex
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedsim
from fedsim import __version__, cli
from fedsim.errors import UserError

HEAVY = ("torch", "flwr", "hydra", "omegaconf", "numpy", "rich", "yaml")


class Simulation(types.ModuleType):
    """Stands in for fedsim.simulation: the runs themselves are tested elsewhere."""

    def __init__(self) -> None:
        super().__init__("fedsim.simulation")
        self.calls: list[tuple[Any, ...]] = []
        self.act: Callable[[], None] = lambda: None

    def run(self, config: Any, observer: Any) -> None:
        self.calls.append(("run", config))
        self.act()

    def resume(self, folder: Path, overrides: list[str], observer: Any) -> None:
        self.calls.append(("resume", folder, overrides))
        self.act()

    def partition(self, config: Any, observer: Any) -> None:
        self.calls.append(("partition", config))
        observer.skew([("label TV", 0.5, "")])


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    importlib.import_module("fedsim.replicas")  # takes names of the real one
    fake = Simulation()
    monkeypatch.setitem(sys.modules, "fedsim.simulation", fake)
    monkeypatch.setattr(fedsim, "simulation", fake, raising=False)
    return fake


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


# ---- help and version


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *words)
    assert (code, err) == (0, "")
    for verb in cli.VERBS:
        assert f"\n  {verb}" in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_command_has_help_and_version(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        code, out, err = said(capsys, verb, option)
        assert (code, err) == (0, "")
        assert f"usage: fedsim {verb} [" in out
        assert f"\n  fedsim {verb}" in out  # an example
        assert max(map(len, out.splitlines())) <= 120
    assert said(capsys, verb, "--version") == (0, f"fedsim {__version__}\n", "")
    assert said(capsys, "--version") == (0, f"fedsim {__version__}\n", "")


def test_examples_of_the_help_compose() -> None:
    from fedsim.config import compose
    from fedsim.sweep import grammar, plan

    examples = [
        shlex.split(line) for verb in cli.VERBS.values() for line in verb.details.splitlines() if "  fedsim " in line
    ]
    examples += [shlex.split(line) for line in cli._help().splitlines() if line.startswith("  fedsim ")]
    assert len(examples) > 8
    for _, verb, *words in examples:
        assert verb in cli.VERBS
        if any(word.startswith("resume=") for word in words):
            continue
        if verb in ("run", "partition", "config"):
            compose(words)
        elif verb in ("sweep", "tune"):
            plan.check(grammar.read(words, namespaces=("sweep", "tune")), None)


def light(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"], ["list", "strategy"], ["rnu"]])
def test_a_light_command_imports_nothing_heavy(words: list[str]) -> None:
    out = light(
        "import sys; from fedsim.cli import main\n"
        f"main({words!r})\nprint(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
        f"assert not set({HEAVY!r}) & set(sys.modules), sys.modules.keys()"
    )
    assert out or words == ["rnu"]


def test_a_wrong_name_is_refused_before_anything_heavy_loads() -> None:
    light(
        "import sys; from fedsim.cli import main\n"
        "for verb in ('run', 'sweep', 'tune', 'partition', 'config'):\n"
        "    assert main([verb, 'strategy=fedavgg']) == 2\n"
        "assert not {'torch', 'flwr', 'matplotlib', 'pyarrow'} & set(sys.modules)"
    )


def test_a_run_loads_only_what_it_uses(tmp_path: Path) -> None:
    """A logistic regression by an own rule: no Flower, no plotting, no compiler, no pandas beside the written table."""
    unused = {"flwr", "grpc", "google.protobuf", "matplotlib", "pandas", "sklearn", "scipy", "rich", "sympy", "ray",
              "torch._dynamo", "torch._inductor", "fedsim.sweep", "fedsim.report", "fedsim.replicas"}  # fmt: skip
    light(
        "import gc, sys; from fedsim.cli import main\n"
        f"assert main(['run', 'data=digits', 'num_rounds=1', 'hydra.run.dir={tmp_path / 'run'}']) == 0\n"
        f"assert not {unused!r} & set(sys.modules), {unused!r} & set(sys.modules)\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    assert (tmp_path / "run" / "partition.png").exists()
    assert (tmp_path / "run" / "clients.parquet").exists()


def test_composing_needs_neither_torch_nor_flower() -> None:
    light("import sys; from fedsim.cli import main; main(['config'])\nassert not {'torch', 'flwr'} & set(sys.modules)")


def test_python_m_fedsim() -> None:
    done = subprocess.run([sys.executable, "-m", "fedsim", "nix"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedsim: no command 'nix'")


# ---- wrong input: exit code 2, one line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["rnu"], "no command 'rnu'; did you mean 'run'?"),
        (["seed=3"], "the command comes first: fedsim run seed=3"),
        (["--seed=3"], "the command comes first: fedsim run seed=3"),
        (["run", "--num-rounds=3"], "no option '--num-rounds=3'; a setting is written without dashes: num_rounds=3"),
        (["run", "-x"], "no option '-x'"),
        (["run", "--config-di", "."], "no option '--config-di'"),
        (["run", "--config-dir"], "--config-dir: expected one argument"),
        (["run", "--config-dir", "nix"], "--config-dir nix: no such folder"),
        (["run", "strategy=fedavgg"], "did you mean 'fedavg'"),
        (["run", "num_rounds=ten"], "num_rounds must be an integer"),
        (["run", "resume=nix"], "resume=nix: no such folder"),
        (["run", "resume=.", "--config-dir", "."], ". is not a run folder"),
        (["partition", "resume=."], "resume is for fedsim run"),
        (["partition", "partition.alpah=1"], "did you mean 'alpha'"),
        (["config", "seed=x"], "seed must be an integer"),
        (["list", "strategies"], "did you mean 'strategy'"),
        (["list", "a", "b"], "takes one group"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(words: list[str], part: str, capsys: pytest.CaptureFixture[str], simulation: Simulation) -> None:
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("fedsim: ")
    assert err.count("\n") == 1
    assert part in err
    assert simulation.calls == []


@pytest.mark.parametrize(
    "words", [["-v", "config", "seed=x"], ["config", "seed=x", "-v"], ["config", "--verbose", "seed=x"]]
)
def test_v_shows_the_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert "Traceback" in err
    assert err.splitlines()[-1] == "fedsim: seed must be an integer, got 'x'"


# ---- the commands


def test_run_composes_and_notes(capsys: pytest.CaptureFixture[str], simulation: Simulation) -> None:
    code, out, err = said(capsys, "run", "strategy=fedld", "--config-dir", ".", "client=sgd", "num_rounds=3")
    ((verb, config),) = simulation.calls
    assert (code, err, verb, config.num_rounds) == (0, "", "run", 3)
    assert out == "note: strategy=fedld is paired with client=margin; client=sgd was asked for and is used\n"


def test_run_resumes(capsys: pytest.CaptureFixture[str], simulation: Simulation, tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    code, _, _ = said(capsys, "run", f"resume='{folder}'", "num_rounds=3", "engine.workers=2")
    assert code == 0
    assert simulation.calls == [("resume", folder, ["num_rounds=3", "engine.workers=2"])]


def test_partition_shows_the_table(capsys: pytest.CaptureFixture[str], simulation: Simulation) -> None:
    assert said(capsys, "partition", "partition.alpha=0.1") == (0, "label TV  0.5\n", "")
    assert simulation.calls[0][1].partition.alpha == 0.1


def test_config_prints_yaml_and_notes_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, "config", "strategy=fedld", "client=sgd", "seed=5")
    tree = yaml.safe_load(out)
    assert (code, tree["seed"]) == (0, 5)
    assert "hydra" not in tree
    assert err.startswith("note: strategy=fedld")


def test_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "strategy" in said(capsys, "list")[1]
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text("# My very own.\n_target_: a.B\n")
    assert "My very own." in said(capsys, "list", "strategy", "--config-dir", str(tmp_path))[1]


def test_a_module_beside_the_user_is_found_last(
    capsys: pytest.CaptureFixture[str], simulation: Simulation, tmp_path: Path
) -> None:
    (tmp_path / "strategies").mkdir()  # users' folders have such names; they must not hide anything
    said(capsys, "run")
    assert sys.path[-1] == str(tmp_path)


# ---- failures while running


def fail(simulation: Simulation, error: BaseException) -> None:
    def act() -> None:
        raise error

    simulation.act = act


WHERE = f"({__file__}:{inspect.getsourcelines(fail)[1] + 2}, `raise error`; -v shows more)"  # not fedsim's own line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("20 clients, 10 samples"), 2, "fedsim: 20 clients, 10 samples"),
        (RuntimeError("all updates were bad\nmore"), 1, f"fedsim: all updates were bad {WHERE}"),
        (ValueError("a bug"), 1, f"fedsim: ValueError: a bug {WHERE}"),
        (MemoryError(), 1, f"fedsim: MemoryError:  {WHERE}"),
        (OSError(28, "No space left on device", "x"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "fedsim: interrupted before the first checkpoint; there is nothing to resume"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_exit_codes(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], simulation: Simulation
) -> None:
    fail(simulation, error)
    got, out, err = said(capsys, "run", "hydra.run.dir=run")
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert line in err


@pytest.mark.parametrize("name", ["run", "my run, it's α=0.1"])
def test_an_interrupt_says_how_to_go_on(
    name: str, capsys: pytest.CaptureFixture[str], simulation: Simulation, tmp_path: Path
) -> None:
    folder = tmp_path / name
    (folder / "checkpoints" / "round_3").mkdir(parents=True)
    fail(simulation, KeyboardInterrupt())

    def words_of(err: str) -> list[str]:  # as a shell would read the command
        return shlex.split(err.split("go on with: fedsim ")[1])

    quoted = str(folder).replace("'", "\\'")
    code, _, err = said(capsys, "run", f"hydra.run.dir='{quoted}'")
    assert code == 130
    simulation.act = lambda: None
    assert cli.main(words_of(err)) == 0
    assert simulation.calls[-1] == ("resume", folder, [])

    fail(simulation, KeyboardInterrupt())
    code, _, again = said(capsys, *words_of(err))
    assert code == 130
    assert words_of(again) == words_of(err)


def test_a_signal_of_a_scheduler_ends_a_command_like_ctrl_c(
    capsys: pytest.CaptureFixture[str], simulation: Simulation
) -> None:
    simulation.act = lambda: os.kill(os.getpid(), signal.SIGTERM)
    code, _, err = said(capsys, "run", "hydra.run.dir=run")
    assert (code, err.count("\n")) == (143, 1)
    assert "interrupted" in err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m fedsim list strategy | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ascii_terminal_loses_a_character_not_the_command() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fedsim", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "flower/?" in done.stdout


def test_warnings_are_lines(capsys, monkeypatch):
    verb = cli.VERBS["list"]
    monkeypatch.setitem(cli.VERBS, "list", verb._replace(act=lambda given: warnings.warn("mind this", stacklevel=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert cli.main(["list"]) == 0
        assert warnings.showwarning is before
    assert capsys.readouterr().err == "warning: mind this\n"


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [("", {}, "10000"), ("", {"GOMP_SPINCOUNT": "5"}, "5"), ("", {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
     ("import sys; sys.modules['torch'] = sys; ", {}, "None")],
)  # fmt: skip
def test_idle_threads_of_torch_sleep_soon_unless_somebody_else_decides(before, given, expected):
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"{before}import fedsim, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
