"""The command line: `fedsim VERB overrides…`.

Imports nothing heavy before it is needed: `--help` and `--version` load neither Hydra nor torch nor Flower.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fedsim import __version__, plugins
from fedsim.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fedsim.console import Observer

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


class Verb(NamedTuple):
    """One command: a line of help, longer help with examples, what it takes, and what it does."""

    summary: str
    details: str
    takes: str  # name of its positional arguments in the help
    act: Callable[[Arguments], None]
    options: Mapping[str, str] = {}  # further options that take a value: name → help


class Arguments(NamedTuple):
    """What was given to a verb."""

    words: list[str]
    config_dir: Path | None
    options: Mapping[str, str]  # those of the verb's own options that were given


class Stopped(KeyboardInterrupt):
    """Interrupted, with what to say about going on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log in ASCII loses a dash, not the run
    verbose = any(word in ("-v", "--verbose") for word in words)
    try:
        return _dispatch([word for word in words if word not in ("-v", "--verbose")])
    except UserError as error:
        return _report(error, str(error), WRONG_INPUT, verbose=verbose)
    except KeyboardInterrupt as error:
        return _report(error, str(error) or "interrupted", INTERRUPTED, verbose=verbose)
    except BrokenPipeError:  # `fedsim list | head`
        from fedsim.console import discard

        discard(sys.stdout)
        return DONE
    except Exception as error:  # the last place where a failure can become one line
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if type(error) is RuntimeError and first else f"{type(error).__name__}: "
        hint = "" if verbose else " (-v shows where)"
        return _report(error, f"{kind}{first}{hint}", FAILED, verbose=verbose)


def _report(error: BaseException, line: str, code: int, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    print(f"fedsim: {line}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] in ("-V", "--version"):
        print(f"fedsim {__version__}")
    elif words[0] not in VERBS:
        _refuse_verb(words[0])
    else:
        _run_verb(words[0], words[1:])
    return DONE


def _refuse_verb(word: str) -> NoReturn:
    if "=" in word:
        raise UserError(f"the command comes first: fedsim run {word.lstrip('-')}")
    raise UserError(f"no command {word!r}{did_you_mean(word, VERBS)}")


def _run_verb(name: str, words: list[str]) -> None:
    verb = VERBS[name]
    parser = _Parser(
        prog=f"fedsim {name}",
        usage=_usage(name, verb),
        description=verb.summary + ".\n\n" + textwrap.dedent(verb.details).strip(),
        epilog=plugins.help_text() if verb.takes == "name=value" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("words", nargs="*", metavar=verb.takes, help=argparse.SUPPRESS)
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="folder of further choices: DIR/strategy/x.yaml")
    for option, text in verb.options.items():
        parser.add_argument(f"--{option}", metavar=option.upper(), help=text)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("-V", "--version", action="version", version=f"fedsim {__version__}", help="show the version")
    parser.add_argument("-h", "--help", action="help", help="show this help")
    try:
        given, unknown = parser.parse_known_intermixed_args(words)
    except SystemExit:  # --help and --version have printed
        return
    if unknown:
        bare = unknown[0].lstrip("-").replace("-", "_")
        hint = f"; a setting is written without dashes: {bare}" if bare else ""
        raise UserError(f"fedsim {name} has no option {unknown[0]!r}{hint}")
    for line in plugins.installed()[1]:
        print(f"warning: {line}", file=sys.stderr)
    _make_importable(Path.cwd())
    options = {option: value for option in verb.options if (value := getattr(given, option)) is not None}
    verb.act(Arguments(given.words, given.config_dir, options))


def _usage(name: str, verb: Verb) -> str:
    more = "" if name in ("list", "compare", "new") else " ..."
    options = " [options]" if verb.options else ""
    return f"fedsim {name} [{verb.takes}{more}]{options} [--config-dir DIR] [-v]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _make_importable(folder: Path) -> None:
    """Let `_target_: my_module.MyRule` find a module beside the user, behind all that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    added = f"{text}\n\n" if (text := plugins.help_text()) else ""
    return f"""\
usage: fedsim COMMAND [name=value ...] [--config-dir DIR] [-v]

Federated-learning simulation for heterogeneous clients.

commands:
{verbs}

examples:
  fedsim run strategy=fedld partition.alpha=0.1
  fedsim run resume=outputs/2026-01-31/12-00-00-fedld num_rounds=200
  fedsim partition partition=shards partition.num_clients=100
  fedsim list strategy

{added}Each command has its own --help. -v shows the traceback of an error, --version the version.
Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted."""


def _act_run(given: Arguments) -> None:
    from fedsim import config, console

    parsed = [config.parse(word) for word in given.words]
    folders = [item for item in parsed if item.key == "resume" and item.parsed.value() is not None]
    with console.open_observer() as observer:
        if folders:
            others = [item.text for item in parsed if item not in folders]
            _resume(Path(str(folders[0].parsed.value())), others, given.config_dir, observer)
            return
        composed = config.compose(given.words, config_dir=given.config_dir)
        for line in config.notes(composed):
            observer.note(line)
        from fedsim import simulation

        try:
            simulation.run(composed, observer)
        except KeyboardInterrupt as error:
            raise Stopped(_how_to_resume(Path(composed.hydra.run.dir))) from error


def _resume(folder: Path, overrides: list[str], config_dir: Path | None, observer: Observer) -> None:
    if config_dir is not None:
        raise UserError("a resumed run keeps its config: leave --config-dir out")
    if not folder.is_dir():
        raise UserError(f"resume={folder}: no such folder")
    from fedsim import simulation

    try:
        simulation.resume(folder, overrides, observer)
    except KeyboardInterrupt as error:
        raise Stopped(_how_to_resume(folder)) from error


def _how_to_resume(folder: Path) -> str:
    from fedsim.misfit import quoted

    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        return "interrupted before the first checkpoint; there is nothing to resume"
    return f"interrupted; go on with: fedsim run {quoted('resume', str(folder))}"


def _act_sweep(given: Arguments) -> None:
    from fedsim.sweep import board, drive

    with board.open_board() as shown:
        drive.sweep(given.words, given.config_dir, shown)


def _act_tune(given: Arguments) -> None:
    from fedsim.sweep import board, tune

    with board.open_board() as shown:
        tune.tune(given.words, given.config_dir, shown)


def _act_partition(given: Arguments) -> None:
    from fedsim import config, console

    composed = config.compose(given.words, config_dir=given.config_dir)
    if composed.resume is not None:
        raise UserError("resume is for fedsim run")
    with console.open_observer() as observer:
        for line in config.notes(composed):
            observer.note(line)
        from fedsim import simulation

        simulation.partition(composed, observer)


def _act_config(given: Arguments) -> None:
    from fedsim import config

    composed = config.compose(given.words, config_dir=given.config_dir)
    for line in config.notes(composed):
        print(f"note: {line}", file=sys.stderr)
    print(config.to_yaml(composed), end="")


def _act_list(given: Arguments) -> None:
    from fedsim import catalogue

    if len(given.words) > 1:
        raise UserError(f"fedsim list takes one group, got {' '.join(map(shlex.quote, given.words))}")
    style = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if given.words:
        print(catalogue.choice_table(given.words[0], given.config_dir, style=style))
    else:
        print(catalogue.group_table(given.config_dir, style=style))
        print("\nfedsim list GROUP says what each choice is; GROUP=CHOICE takes it.")


def _act_report(given: Arguments) -> None:
    from fedsim.report.command import report

    if not given.words:
        raise UserError("fedsim report needs a folder: of a run, or one with runs in it")
    options = {name: Path(value) if name == "out" else value for name, value in given.options.items()}
    text, path = report([Path(word) for word in given.words], **options)  # type: ignore[arg-type]
    print(text if path is None else path)


def _act_compare(given: Arguments) -> None:
    from fedsim.report.difference import compare

    if len(given.words) != 2:
        raise UserError(f"fedsim compare takes two folders, got {len(given.words)}")
    print(compare(*map(Path, given.words)))


def _act_new(given: Arguments) -> None:
    from fedsim.scaffold import KINDS, new

    if len(given.words) != 2:
        raise UserError(
            f"fedsim new takes a kind ({', '.join(KINDS)}) and a name, for example fedsim new strategy mine"
        )
    kind, name = given.words
    made = new(kind, name, Path())
    print("\n".join(str(made.folder / file) for file in made.files))
    print(f"\npip install -e {made.folder}\nfedsim run {made.choice}\npytest {made.folder}")


VERBS = {
    "run": Verb(
        "Train a federation and write a run folder",
        """
        Settings are written name=value (Hydra's grammar); `fedsim config` shows all of them with their defaults,
        `fedsim list` what can be chosen.

        examples:
          fedsim run
          fedsim run strategy=fedld partition.alpha=0.1 num_rounds=200 seed=1
          fedsim run data=cifar10 data.root=data model=cnn hydra.run.dir=runs/cifar10
          fedsim run resume=runs/cifar10 num_rounds=300
        """,
        "name=value",
        _act_run,
    ),
    "sweep": Verb(
        "Run every combination of values, several at a time, into one table",
        """
        Several values are written a=1,2 or a='range(5)' or strategy='glob(fed*)' (Hydra's sweep grammar). Every trial
        has its run folder in that of the sweep, which is hydra.sweep.dir; the table is sweep.json and sweep.parquet.
        sweep.workers=N trials run at a time; null: one per GPU, or sweep.trials_per_gpu of them, else one per core.

        examples:
          fedsim sweep strategy=fedavg,fedld partition.alpha=0.1,1 seed='range(5)'
          fedsim sweep client.lr=0.03,0.1,0.3 sweep.workers=2 hydra.sweep.dir=runs/rates
          fedsim sweep resume=runs/rates
        """,
        "name=value,value",
        _act_sweep,
    ),
    "tune": Verb(
        "Tune methods fairly, then report each at its best",
        """
        Each value of `strategy` (tune.each=strategy,partition.alpha: each combination) is tried at the same points of
        the other swept settings, with seeds of its own (tune.seeds, default 1000), and takes the point with the best
        tune.metric=validation_accuracy|validation_loss. Then it runs there with the seeds of `seed=`.
        tune.search=grid tries all combinations; random draws tune.trials=20, also from intervals.

        examples:
          fedsim tune strategy=fedavg,fedld client.lr=0.03,0.1,0.3 seed='range(5)'
          fedsim tune strategy=fedavg,fedadam 'client.lr=tag(log,interval(0.01,1))' tune.trials=10 tune.seeds=7,8
          fedsim tune resume=runs/tuned
        """,
        "name=value,value",
        _act_tune,
    ),
    "partition": Verb(
        "Draw a partition, measure its skew and draw its picture, without training",
        """
        Takes the settings of `fedsim run`; writes partition.npz and partition.png to the run folder.

        examples:
          fedsim partition partition.alpha=0.1
          fedsim partition data=heart_disease partition=natural hydra.run.dir=runs/hospitals
        """,
        "name=value",
        _act_partition,
    ),
    "config": Verb(
        "Print the config that a run would have",
        """
        examples:
          fedsim config
          fedsim config strategy=fedld partition.alpha=0.1
        """,
        "name=value",
        _act_config,
    ),
    "list": Verb(
        "List the groups, or one group's choices with their papers",
        """
        examples:
          fedsim list
          fedsim list strategy
          fedsim list strategy --config-dir my_configs
        """,
        "GROUP",
        _act_list,
    ),
    "report": Verb(
        "Write one page, or a table, of runs",
        """
        FOLDER is a run folder, or one with run folders in it, such as a sweep's. The page is whole in itself: it works
        offline. Runs that differ in nothing but seeds are repetitions.

        examples:
          fedsim report runs/rates
          fedsim report runs/rates --format latex --baseline fedavg --metric client_accuracy_worst
        """,
        "FOLDER",
        _act_report,
        {
            "format": "html (the default), latex, markdown or csv",
            "out": "file to write; html: FOLDER/report.html, else the terminal",
            "baseline": "method that the others are tested against; fedavg, or the first",
            "metric": "of the final table, a name in summary.json; accuracy",
        },
    ),
    "compare": Verb(
        "Say which settings and which results of two runs differ",
        """
        A and B are run folders, or folders with runs in them, which are paired by their seeds.

        examples:
          fedsim compare outputs/2026-01-31/12-00-00-fedavg outputs/2026-01-31/12-05-00-fedld
        """,
        "A B",
        _act_compare,
    ),
    "new": Verb(
        "Write a pip package with a strategy, a client or a partition of your own",
        """
        KIND is strategy, client or partition. The package is made in the folder fedsim-NAME, with code that runs, its
        YAML, tests and a README; docs/plugins.md walks through one.

        examples:
          fedsim new strategy mine
          fedsim new partition by_hospital
        """,
        "KIND NAME",
        _act_new,
    ),
}
