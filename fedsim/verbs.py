"""The commands of the command line: what each says of itself, takes and does.

Each imports what it needs when it is called, so that help costs nothing.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedsim.errors import UserError

if TYPE_CHECKING:
    from fedsim.console import Observer


class Verb(NamedTuple):
    """One command: a line of help, longer help with examples, what it takes, and what it does."""

    summary: str
    details: str
    takes: str  # name of its positional arguments in the help
    act: Callable[[Arguments], None]
    options: Mapping[str, str] = {}  # further options that take a value: name → help
    flags: Mapping[str, str] = {}  # those that take none


class Arguments(NamedTuple):
    """What was given to a verb."""

    words: list[str]
    config_dir: Path | None
    options: Mapping[str, str]  # those of the verb's own options that were given; a flag's value is empty


class Stopped(KeyboardInterrupt):
    """Interrupted, with what to say about going on."""


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
        from fedsim import replicas, simulation

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


def _act_sweep(given: Arguments) -> None:
    from fedsim.sweep import board, drive

    with board.open_board() as shown:
        drive.sweep(given.words, given.config_dir, shown)


def _act_tune(given: Arguments) -> None:
    from fedsim.sweep import board, tune

    with board.open_board() as shown:
        tune.tune(given.words, given.config_dir, shown)


def _act_experiment(given: Arguments) -> None:
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


def _act_bench(given: Arguments) -> None:
    from fedsim import config

    composed = config.compose(given.words, config_dir=given.config_dir)
    if composed.resume is not None:
        raise UserError("resume is for fedsim run")
    from fedsim.bench import bench

    report = bench(composed, say=lambda line: print(line, file=sys.stderr))
    print("\n".join(report.lines()))
    if "save" in given.options:
        print(f"engine=auto takes {report.best.name} from now on ({report.save()})")


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


def _act_export(given: Arguments) -> None:
    from fedsim.export import export

    print("\n".join(map(str, export(given.words, given.config_dir))))


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
          fedsim run strategy=fedld replicas=10
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
        sweep.address=auto does them on a Ray cluster instead.
        sweep.batch=true: trials that differ only in seeds and rates train as rows of one program.

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
        tune.search=grid tries all combinations; random draws tune.trials=20, also from intervals; optuna draws them
        where earlier ones did well.

        examples:
          fedsim tune strategy=fedavg,fedld client.lr=0.03,0.1,0.3 seed='range(5)'
          fedsim tune strategy=fedavg,fedadam 'client.lr=tag(log,interval(0.01,1))' tune.trials=10 tune.seeds=7,8
          fedsim tune resume=runs/tuned
        """,
        "name=value,value",
        _act_tune,
    ),
    "experiment": Verb(
        "Run an experiment whose claims and criteria are written down, and say which hold",
        """
        NAME is a choice of the group experiment: arms, settings, seeds, and claims with their metric and the smallest
        difference that matters. Arms are tuned with one budget on validation data; then runs of other seeds, paired
        by partition, initial model and cohorts, are tested: interval, Holm, equivalence, controls. An interrupted
        command goes on when it is given again. Settings hold for all runs; experiment.seeds=2 for the plan.

        examples:
          fedsim list experiment
          fedsim experiment fedld --page docs/results.md
          fedsim experiment flag num_rounds=2 experiment.seeds=2 hydra.sweep.dir=runs/try
        """,
        "NAME",
        _act_experiment,
        {"page": "Markdown file whose section of this name is written"},
    ),
    "bench": Verb(
        "Measure your config on every engine that runs it, in under a minute",
        """
        Takes the settings of `fedsim run` and writes no run folder. One round of each engine warms up and tells memory
        and agreement; then rounds are timed in turn, without evaluation. --save makes engine=auto take the quickest
        for such a config on this machine from now on; the plan of a run says so.

        examples:
          fedsim bench
          fedsim bench data=mnist data.root=data model=logreg partition.num_clients=1000 fraction=0.01 --save
        """,
        "name=value",
        _act_bench,
        flags={"save": "write the quickest engine into your own table of engines"},
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
    "export": Verb(
        "Write a run as a Flower app, for a real deployment",
        """
        `fedsim export flower DIR` makes the folder DIR with an app that `flwr run` starts: its ServerApp has the run's
        strategy, its ClientApp trains the run's clients, one a SuperNode. docs/flower.md says how, with TLS.

        examples:
          fedsim export flower my_app run=runs/first
          fedsim export flower my_app strategy=fedld partition.num_clients=3 fraction=1 num_rounds=5
        """,
        "flower DIR run=FOLDER|name=value",
        _act_export,
    ),
}
