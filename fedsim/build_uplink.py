"""From the groups `attack` and `compressor` to what lies between clients and rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedsim.attacks.adversary import Adversary
from fedsim.config import Config, instantiate, plain
from fedsim.data.splits import ClientSplits
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Task
from fedsim.errors import UserError
from fedsim.uplink import Uplink

SHARED = ("fraction", "knowledge", "seed")  # what every attack has beside its own arguments

Parts = Mapping[str, Any]


def build_adversary(config: Config, parts: Parts, splits: ClientSplits, seed: int) -> Adversary | None:
    """Build the attackers of a run; None where nobody attacks.

    Args:
        config: with the group `attack`.
        parts: `attack` may stand in for the group's target.
        splits: whose training samples are whose.
        seed: the run's, where attack.seed is null.

    Raises:
        UserError: a wrong setting.

    """
    node = plain(config.attack)
    shared = {name: node.pop(name) for name in SHARED if name in node}
    attack = parts.get("attack") or instantiate(node, "attack")
    if attack is None:
        if shared.get("fraction"):
            raise UserError(f"attack.fraction={shared['fraction']}: attack=none has no attackers; choose an attack")
        return None
    own = shared.get("seed")
    try:
        return Adversary(
            attack, clients=np.flatnonzero(splits.train.sizes > 0), num_clients=splits.train.num_clients,
            fraction=float(shared.get("fraction", 0.0)), knowledge=shared.get("knowledge", "all"),
            seed=seed if own is None else own,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise UserError(f"attack: {error}") from error


def build_uplink(config: Config, parts: Parts, task: Task, adversary: Adversary | None) -> Uplink | None:
    """Build what lies between clients and rule; None where updates arrive as they were trained.

    Raises:
        UserError: a compressor that does not fit the model.

    """
    compressor = parts.get("compressor") or instantiate(config.compressor, "compressor")
    if adversary is None and compressor is None:
        return None
    sizes = task.partition.sizes
    try:
        uplink = Uplink(
            task.shared, len(sizes), int((sizes > 0).sum()), dtype=task.dtype, compressor=compressor,
            adversary=adversary,
        )  # fmt: skip
        uplink.store = ClientStore(len(sizes), uplink.store.first, memory=task.store.memory)
        return uplink
    except ValueError as error:
        raise UserError(f"compressor: {error}") from error


def check_uplink(uplink: Uplink, strategy: Any, *, foreign: bool) -> None:
    """Refuse what could not work.

    Args:
        uplink: of the run.
        strategy: a rule or a Flower strategy.
        foreign: whether clients are a Flower app's.

    Raises:
        UserError: attacks or compression where fedsim's own clients do not train, or an attack that has to know a
            rule where there is none.

    """
    if foreign:
        raise UserError("attack and compressor act on fedsim's own clients; with client=flower_app use none")
    if uplink.needs_rows and not uplink.layout.size:
        raise UserError(f"{uplink.needs_rows} acts on updates, and here no parameter leaves its client")
    adversary = uplink.adversary
    if adversary is None:
        return
    if getattr(strategy, "pooled", False):
        raise UserError("attack: a pooled strategy has no clients to attack it; use attack=none")
    if adversary.knows_rule and not callable(strategy):
        name = type(adversary.attack).__name__
        raise UserError(f"attack: {name} has to know the server's rule; use one of fedsim's own, not a Flower strategy")
