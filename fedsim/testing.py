"""For people who write strategies: build a rule by its name, apply it to a matrix, run the laws on it.

>>> rule = build_rule("fedavg", server_lr=0.5)
>>> apply_rule(rule, [[1.0, 0.0], [0.0, 4.0]], weights=[3, 1])
array([0.375, 0.5  ])
>>> check_strategy(rule)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy.typing as npt
from torch import Tensor

from fedsim import laws as matrix_laws
from fedsim.catalogue import options, roots
from fedsim.checks import RUN_LAWS, Federation, check_runs
from fedsim.checks import check_client as check_client
from fedsim.contracts import Rule, State
from fedsim.errors import UserError, did_you_mean
from fedsim.laws import cohort_of as cohort_of
from fedsim.linalg import finite_rows
from fedsim.plugins import search_path


def check_strategy(
    rule: Any,
    *,
    client: Any = None,
    laws: Collection[str] | None = None,
    num_clients: int = 9,
    settings: Sequence[str] = (),
) -> None:
    """Run the laws on a strategy; say which failed and what to do about it.

    Those of a rule on a matrix (`fedsim.laws`), then those of runs (`check_client`): both engines agree, a run that
    is cut off goes on to the bit, float32 follows float64, and a Flower deployment gives the same weights.

    Args:
        rule: a server rule, or the name of a choice, which brings its client along.
        client: the objective that it goes with, or the name of a choice; None: the choice's own, else plain SGD.
        laws: which to run, of both kinds; None: all that every rule keeps.
        num_clients: K of the matrices drawn, large enough for the rule.
        settings: of the runs, e.g. "client.batch_size=null".

    Raises:
        AssertionError: a law does not hold; the message names it and the cure.
        ValueError: `laws` names one that there is not, or the rule needs more clients.

    """
    known = {*matrix_laws.LAWS, *RUN_LAWS}
    for name in laws or ():
        if name not in known:
            raise ValueError(f"no law {name!r}{did_you_mean(name, known)}")
    on_matrix = None if laws is None else [name for name in laws if name in matrix_laws.LAWS]
    built = build_rule(rule) if isinstance(rule, str) else rule
    matrix_laws.check_strategy(built, laws=on_matrix, num_clients=num_clients)
    in_runs = [name for name in RUN_LAWS if laws is None or name in laws]
    if in_runs:
        check_runs(Federation(rule, client, settings), in_runs)


def build_rule(name: str, **arguments: Any) -> Any:
    """Build the rule that `fedsim run strategy=NAME` builds, with the defaults of its YAML.

    Args:
        name: as on the command line, e.g. "fedld".
        arguments: values instead of the YAML's; plain values or objects.

    Returns:
        The rule.

    Raises:
        UserError: no such strategy, or an argument that its YAML does not list.
        ValueError: an argument out of its range.

    """
    from hydra import compose, initialize_config_module
    from hydra.errors import MissingConfigException
    from hydra.utils import get_object, instantiate
    from omegaconf import OmegaConf

    with initialize_config_module(config_module="fedsim.configs", version_base="1.3"):
        try:
            composed = compose(
                overrides=[
                    "+model=mlp",
                    "+client=sgd",
                    "+compressor=none",
                    "+sampler=uniform",
                    f"+strategy={name}",
                    *search_path(),
                ]
            )
        except MissingConfigException as error:
            known = strategy_names()
            raise UserError(f"no strategy {name!r}{did_you_mean(name, known)}") from error
    config = OmegaConf.to_container(composed.strategy, resolve=True)
    assert isinstance(config, dict)  # a group's YAML is a mapping
    target = config.pop("_target_")
    for argument in arguments:
        if argument not in config:
            raise UserError(f"strategy {name} has no argument {argument!r}{did_you_mean(argument, map(str, config))}")
    nested = {str(key): value for key, value in config.items() if key not in arguments}
    built = {key: instantiate(value) if isinstance(value, dict) else value for key, value in nested.items()}
    return get_object(target)(**built, **arguments)


def strategy_names() -> list[str]:
    """Return the names of fedsim's own strategies, ascending; Flower's are under `flower/`."""
    return [name for name in options("strategy", roots()[:1]) if "/" not in name]


def apply_rule(
    rule: Rule,
    updates: npt.ArrayLike | Tensor,
    weights: npt.ArrayLike | Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    state: State | None = None,
    round: int = 1,
) -> npt.NDArray[Any]:
    """Apply a rule to a matrix and return the step that it takes.

    Rows that hold a NaN or an infinity are dropped first, as in a run.

    Args:
        rule: what to apply.
        updates: (K, D) rows w_k − w_received, of any float precision.
        weights: (K,) n_k ≥ 0; None counts every client once.
        sizes: lengths of the layers, summing to D; None is one layer.
        state: the rule's memory, as `init` or an earlier call left it; None is `init`'s, where momenta and
            everything else remembered of earlier aggregates are zero: no previous aggregate.
        round: 0 is the first round of a run, which some rules treat apart; 1 is the second.

    Returns:
        The step (D,), in the precision of the updates.

    Raises:
        ValueError: shapes that do not fit, or a cohort too small for the rule.

    """
    cohort = cohort_of(updates, weights, sizes=sizes, round=round + 1)
    if not bool((finite := finite_rows(cohort.rows)).all()):
        cohort = cohort.take(finite)
    if hasattr(rule, "check"):
        rule.check(len(cohort))
    memory = rule.init(cohort.layout, len(cohort)) if state is None else state
    delta, _, _ = rule(cohort, memory)
    return delta.detach().cpu().numpy()
