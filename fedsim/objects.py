"""What a config says of objects that stand in for groups: `fedsim.simulate(strategy=FedLD(), data=my_dataset)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedsim.config import Config, from_tree, plain
from fedsim.local import LocalTraining
from fedsim.saved import run_dir_named

# What fedsim itself reads of a group's settings, beside those of its target: an object stands for the target alone.
_KEPT = {
    "data": ("validation",),
    "partition": ("seed", "held_out_clients", "local_validation", "local_test"),
    "model": ("seed", "init", "trainable", "local"),
    "client": tuple(LocalTraining.__dataclass_fields__),
    "sampler": ("seed",),
    "attack": ("fraction", "knowledge", "seed"),
}


def with_parts(config: Config, parts: Mapping[str, Any]) -> Config:
    """Put objects in a config in the place of what they stand for, so that nobody takes its text for what was run."""
    names = {name: getattr(part, "__name__", type(part).__name__) for name, part in parts.items()}
    if "strategy" in parts:
        run_dir_named(config, names["strategy"].lower())
    tree = plain(config)
    tree["hydra"]["parts"] = sorted(parts)
    choices = tree["hydra"]["runtime"]["choices"]
    for name in set(parts) & set(choices):
        choices[name] = f"<{names[name]}>"
        kept = {key: value for key, value in tree[name].items() if key in _KEPT.get(name, ())}
        tree[name] = {"_target_": f"<{names[name]}>", **kept}
    if "training" in parts and isinstance(parts["training"], LocalTraining):
        tree["client"] |= asdict(parts["training"])
    return from_tree(tree)
