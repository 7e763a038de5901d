"""What the commands of the command line do.

Each imports what it needs when it is called, so that help costs nothing.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedsim.errors import UserError
from fedsim.loading import link_torch, loading

if TYPE_CHECKING:
    from fedsim.console import Observer


class Arguments(NamedTuple):
    """What was given to a verb."""

    words: list[str]
    config_dir: Path | None
    options: Mapping[str, str]  # those of the verb's own options that were given; a flag's value is empty


class Stopped(KeyboardInterrupt):
    """Interrupted, with what to say about going on."""


def run(given: Arguments) -> None:
    """Train one run, a set of replicas, or what `resume=` names."""
    with loading():
        link_torch()
        from fedsim import config, console

        parsed = [config.parse(word) for word in given.words]
    folders = [item for item in parsed if item.key == "resume" and item.parsed.value() is not None]
    with console.open_observer() as observer:
        if folders:
            others = [item.text for item in parsed if item not in folders]
            _resume(Path(str(folders[0].parsed.value())), others, given.config_dir, observer)
            return
        with loading():
            composed = config.compose(given.words, config_dir=given.config_dir)
            for line in config.notes(composed):
                observer.note(line)
            if composed.replicas > 1:
                from fedsim import replicas
            else:
                from fedsim import simulation
        try:
            if composed.replicas > 1:
                replicas.run(composed, observer)
            else:
                simulation.run(composed, observer)
        except KeyboardInterrupt as error:
            raise Stopped(_how_to_resume(Path(composed.hydra.run.dir))) from error


def _resume(folder: Path, overrides: list[str], config_dir: Path | None, observer: Observer) -> None:
    if not folder.is_dir():
        raise UserError(f"resume={folder}: no such folder")
    with loading():
        from fedsim import replicas, saved, simulation

    try:
        if replicas.is_set(folder):
            replicas.resume(folder, overrides, config_dir, observer)
        else:
            saved.check_config_dir(folder, config_dir)
            simulation.resume(folder, overrides, observer)
    except KeyboardInterrupt as error:
        raise Stopped(_how_to_resume(folder)) from error


def _how_to_resume(folder: Path) -> str:
    from fedsim.misfit import quoted

    if not any(folder.glob("checkpoints/*")) and not any(folder.glob("seed-*/checkpoints/*")):
        return "interrupted before the first checkpoint; there is nothing to resume"
    return f"interrupted; go on with: fedsim run {quoted('resume', str(folder))}"


def sweep(given: Arguments) -> None:
    """Run every combination of the values given."""
    from fedsim.sweep import board, drive

    with board.open_board() as shown:
        drive.sweep(given.words, given.config_dir, shown)


def tune(given: Arguments) -> None:
    """Tune methods, then run each at its best."""
    from fedsim.sweep import board, tune

    with board.open_board() as shown:
        tune.tune(given.words, given.config_dir, shown)


def experiment(given: Arguments) -> None:
    """Run an experiment and print which of its claims hold."""
    from fedsim.study.drive import experiment
    from fedsim.study.page import put
    from fedsim.sweep import board

    if not given.words or "=" in given.words[0]:
        raise UserError("fedsim experiment needs a name; fedsim list experiment shows them")
    name, *words = given.words
    with board.open_board() as shown:
        folder, text = experiment(name, words, given.config_dir, shown)
    print(f"\n{text}\n{folder}/results.md")
    if "page" in given.options:
        put(Path(given.options["page"]), name, text)


def bench(given: Arguments) -> None:
    """Measure the engines on a config; with --save, keep the quickest."""
    from fedsim import config

    composed = config.compose(given.words, config_dir=given.config_dir)
    if composed.resume is not None:
        raise UserError("resume is for fedsim run")
    from fedsim.bench import bench

    report = bench(composed, say=lambda line: print(line, file=sys.stderr))
    print("\n".join(report.lines()))
    if "save" in given.options:
        print(f"engine=auto takes {report.best.name} from now on ({report.save()})")


def partition(given: Arguments) -> None:
    """Draw a partition without training."""
    from fedsim import config, console

    composed = config.compose(given.words, config_dir=given.config_dir)
    if composed.resume is not None:
        raise UserError("resume is for fedsim run")
    with console.open_observer() as observer:
        for line in config.notes(composed):
            observer.note(line)
        from fedsim import simulation

        simulation.partition(composed, observer)


def print_config(given: Arguments) -> None:
    """Print the config of a run."""
    from fedsim import config

    composed = config.compose(given.words, config_dir=given.config_dir)
    for line in config.notes(composed):
        print(f"note: {line}", file=sys.stderr)
    print(config.to_yaml(composed), end="")


def list_choices(given: Arguments) -> None:
    """Print the groups, or the choices of one."""
    from fedsim import catalogue

    if len(given.words) > 1:
        raise UserError(f"fedsim list takes one group, got {' '.join(map(shlex.quote, given.words))}")
    style = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if given.words:
        print(catalogue.choice_table(given.words[0], given.config_dir, style=style))
    else:
        print(catalogue.group_table(given.config_dir, style=style))
        print("\nfedsim list GROUP says what each choice is; GROUP=CHOICE takes it.")


def report(given: Arguments) -> None:
    """Print a table of runs, or where their page is."""
    from fedsim.report.command import report

    if not given.words:
        raise UserError("fedsim report needs a folder: of a run, or one with runs in it")
    options = {name: Path(value) if name == "out" else value for name, value in given.options.items()}
    text, path = report([Path(word) for word in given.words], **options)  # type: ignore[arg-type]
    print(text if path is None else path)


def compare(given: Arguments) -> None:
    """Print what differs between two runs."""
    from fedsim.report.difference import compare

    if len(given.words) != 2:
        raise UserError(f"fedsim compare takes two folders, got {len(given.words)}")
    print(compare(*map(Path, given.words)))


def new(given: Arguments) -> None:
    """Write a package, and print what to do with it."""
    from fedsim.scaffold.package import KINDS, new

    if len(given.words) != 2:
        raise UserError(
            f"fedsim new takes a kind ({', '.join(KINDS)}) and a name, for example fedsim new strategy mine"
        )
    kind, name = given.words
    made = new(kind, name, Path())
    print("\n".join(str(made.folder / file) for file in made.files))
    print(f"\npip install -e {made.folder}\nfedsim run {made.choice}\npytest {made.folder}")


def export(given: Arguments) -> None:
    """Write a Flower app, and print its files."""
    from fedsim.export import export

    print("\n".join(map(str, export(given.words, given.config_dir))))
