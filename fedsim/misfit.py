"""What to say about an override that does not fit: what is wrong, what was expected, the nearest right name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedsim import catalogue, plugins
from fedsim.errors import did_you_mean

_SHOWN = 170  # characters of choices; more are not listed in an error


def grammar(text: str) -> str:
    """Say why Hydra's grammar refuses an override."""
    key, equals, value = text.partition("=")
    if not equals:
        groups = [g for g in catalogue.defaults() if text in catalogue.options(g, catalogue.roots())]
        hint = f"; did you mean {groups[0]}={text}?" if groups else "; write name=value, for example seed=1"
        return f"{text!r} sets nothing{hint}"
    if (
        not key.strip("+~ ")
        or not all(c.isalnum() or c in "_-./@+~:$" for c in key)
        or ".." in key
        or key[0] in ".0123456789"
    ):
        return f"{text!r}: {key!r} is not the name of a setting; write name=value, for example seed=1"
    if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
        return f"{text!r}: a bracket is not closed"
    if (value.count("'") % 2 and '"' not in value) or (value.count('"') % 2 and "'" not in value):
        return f"{text!r}: a quotation mark is not closed"
    return f"{text!r}: cannot read the value; put it in quotes that the shell keeps: {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    r"""Return key=value with the quotes that Hydra's grammar and a POSIX shell need.

    >>> quoted("seed", "3"), quoted("data.positive", ">0"), quoted("data.path", "it's.csv")
    ('seed=3', '\'data.positive=">0"\'', '\'data.path="it\'\\\'\'s.csv"\'')
    """
    if value and all(c.isascii() and (c.isalnum() or c in "/._-") for c in value):
        return f"{key}={value}"
    inner = value.replace('"', '\\"')
    return "'" + f'{key}="{inner}"'.replace("'", "'\\''") + "'"


def no_choice(group: str, name: str, known: Iterable[str]) -> str:
    """Say that a group has no such choice."""
    known = list(known)
    what = f"no {group} {name!r}" if name else f"{group} needs a name"
    inside = [option for option in known if name and option.startswith(name + "/")]
    if inside:
        return f"{what}, it is a folder; did you mean {inside[0]!r}?"
    ends = [option for option in known if name and option.endswith("/" + name.lower())]
    if ends and name.lower() not in known:
        return f"{what}; did you mean {ends[0]!r}?"
    hint = did_you_mean(name.lower(), known)
    near = hint.partition("did you mean '")[2].partition("'")[0]
    if origin := plugins.origin_of(catalogue.options(group, catalogue.roots()).get(near)):
        hint += f" It comes from the plug-in {origin}"
    if "did you mean" in hint:
        return what + hint
    shown = hint if len(hint) <= _SHOWN else f"; see fedsim list {group}"
    return f"{what}{shown}. One of your own comes with --config-dir, one of a plug-in with pip install"


def override(text: str, key: str, tree: Mapping[str, Any], choices: Mapping[str, str]) -> str | None:
    """Say why a value cannot be set; None if it can.

    Args:
        text: the override as it was written, with its sign.
        key: its dotted key.
        tree: the config without it.
        choices: group → choice.

    """
    parts, node = key.split("."), tree
    adds = text.startswith("+")
    for depth, part in enumerate(parts):
        if not isinstance(node, Mapping):
            return f"{text}: {'.'.join(parts[:depth])} is a value, {node!r}, not a group of settings"
        if part not in node:
            return None if adds and depth else no_setting(parts[:depth], part, node, choices)
        node = node[part]
    return f"{key} exists already: write it without '+'" if adds and not text.startswith("++") else None


def no_setting(parents: list[str], name: str, node: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """Say that a node of the config, reached through its parents, has no setting of that name."""
    hidden = "_" if not name.startswith("_") else " "
    hint = did_you_mean(name, [str(known) for known in node if known != "hydra" and str(known)[0] != hidden])
    if parents:
        choice = choices.get(parents[0])
        owner = ".".join(parents) if len(parents) > 1 or choice is None else f"{parents[0]}={choice}"
        return f"{owner} has no setting {name!r}{hint}"
    deeper = [f"{group}.{name}" for group, inner in node.items() if isinstance(inner, Mapping) and name in inner]
    if deeper:
        hint = f"; did you mean {' or '.join(deeper[:3])}?"
    elif "did you mean" not in hint:
        hint = "; see fedsim config for all of them"
    return f"no setting or group {name!r}{hint}"
