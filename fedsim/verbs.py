"""The commands of the command line: what each says of itself, takes, and which action it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedsim import actions


class Verb(NamedTuple):
    """One command: a line of help, longer help with examples, what it takes, and what it does."""

    summary: str
    details: str
    takes: str  # name of its positional arguments in the help
    act: Callable[[actions.Arguments], None]
    options: Mapping[str, str] = {}  # further options that take a value: name → help
    flags: Mapping[str, str] = {}  # those that take none


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
        actions.run,
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
        actions.sweep,
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
        actions.tune,
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
        actions.experiment,
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
        actions.bench,
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
        actions.partition,
    ),
    "config": Verb(
        "Print the config that a run would have",
        """
        examples:
          fedsim config
          fedsim config strategy=fedld partition.alpha=0.1
        """,
        "name=value",
        actions.print_config,
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
        actions.list_choices,
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
        actions.report,
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
        actions.compare,
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
        actions.new,
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
        actions.export,
    ),
}
