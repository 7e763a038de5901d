"""From a composed config to samples: the data set, who has which of them, what attackers and time do to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fedsim.attacks.adversary import Adversary
from fedsim.build_model import seed_of
from fedsim.build_uplink import build_adversary
from fedsim.config import Config, instantiate, plain, settings
from fedsim.contracts import Dataset, Partition
from fedsim.data.check import check_dataset
from fedsim.data.kept import kept
from fedsim.data.splits import ClientSplits, chosen, split_clients, validation_split
from fedsim.errors import UserError, blamed
from fedsim.rng import generator
from fedsim.shift.replaced import Replacement

Parts = Mapping[str, Any]


class Built(NamedTuple):
    """Samples and whose they are."""

    dataset: Dataset
    partition: Partition  # as drawn, positions into the training split
    local: ClientSplits  # its parts, likewise
    splits: ClientSplits  # the same as positions into the data
    adversary: Adversary | None  # who attacks
    shift: Replacement | None  # which samples are replaced when


def build_data(config: Config, parts: Parts, *, share_samples: bool) -> Built:
    """Load the data, draw the partition, let attackers poison theirs, and lay out what replaces samples over time.

    Args:
        config: as `fedsim.config.compose` returns it.
        parts: objects that stand in for groups.
        share_samples: where processes train, put the samples into the one copy that all of them see.

    Raises:
        UserError: anything that cannot be.

    """
    processes = config.engine.name == "processes"
    if processes:
        from fedsim.engine.processes import start_server
        from fedsim.engine.shared import share

        start_server()  # workers load while the data does
    run = settings(config)
    dataset, partition, local, labels = _drawn(config, parts)
    splits = local.at(dataset.splits["train"])
    adversary = build_adversary(config, parts, splits, run.seed)
    clean = dataset.x
    if adversary is not None:
        dataset = adversary.poison(dataset, splits.train)
    replaced, shift = parts.get("shift") or instantiate(config.shift, "shift"), None
    if replaced is not None:
        if dataset.x is not clean:
            raise UserError("attack: it marks samples, which shift replaces by others without the mark; use shift=none")
        with blamed("shift"):
            dataset, shift = replaced(dataset, labels, splits, seed_of(config.partition.seed, run))
    if processes and share_samples:
        dataset = dataset._replace(x=share(dataset.x), y=share(dataset.y))
    return Built(dataset, partition, local, splits, adversary, shift)


def data(config: Config, parts: Parts | None = None) -> tuple[Dataset, Partition, ClientSplits]:
    """Load the data and draw the partition; both its parts hold positions into the training split."""
    return _drawn(config, parts or {})[:3]


def _drawn(config: Config, parts: Parts) -> tuple[Dataset, Partition, ClientSplits, Tensor]:
    """Return what `data` does, and the labels (N,) as they were before a partition corrupted any."""
    run = settings(config)
    dataset = parts.get("data")
    if not isinstance(dataset, Dataset):
        source = own(config.data, "validation")
        dataset = dataset() if callable(dataset) else kept(source, lambda: instantiate(source, "data"))
    dataset = check_dataset(dataset)
    true = dataset.y
    seed = seed_of(config.partition.seed, run)
    with blamed("partition"):
        dataset = validation_split(dataset, config.data.validation, seed)
        partitioner = parts.get("partition") or instantiate(
            own(config.partition, "seed", "held_out_clients", "local_validation", "local_test"), "partition"
        )
        train = dataset.splits["train"]
        column = dataset.domain if getattr(partitioner, "natural_from", "client") == "domain" else dataset.client
        labels = chosen(dataset.y.numpy(), train)
        drawn = partitioner(labels, generator(seed, "partition"), None if column is None else column[train])
        local = split_clients(
            drawn, labels, held_out_clients=config.partition.held_out_clients,
            local_validation=config.partition.local_validation, local_test=config.partition.local_test, seed=seed,
        )  # fmt: skip
        if hasattr(partitioner, "corrupt"):
            touched = local.at(train).join(*getattr(partitioner, "corrupts", ("train", "validation", "test")))
            dataset = partitioner.corrupt(dataset, touched, generator(seed, "corrupt"))
    return dataset, drawn, local, true


def own(node: Config, *names: str) -> dict[str, Any]:
    """Return a group's own arguments, without the ones that all of its choices share."""
    return {name: value for name, value in plain(node).items() if name not in names}
