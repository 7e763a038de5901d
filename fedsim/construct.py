"""Builds what a config names by `_target_`, checking names and types against its signature first.

Hydra's own `instantiate` is not used: it turns every argument into a config node and back, which takes
named tuples of tensors apart, and it finds a wrong type only where the arithmetic trips over it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, Union

from fedsim.errors import UserError, did_you_mean


class _Mismatch(Exception):
    """A value is not of the annotated type."""


def locate(path: object, key: str) -> Any:
    """Import the class or function with a dotted path.

    Args:
        path: e.g. "fedsim.strategies.fedavg.FedAvg".
        key: the setting that names it, for the message.

    Raises:
        UserError: there is none; the message says which part of the path is the first that is missing.

    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise UserError(f"{key} must be a dotted path to a class or function, like package.module.Name, got {path!r}")
    parts = path.split(".")
    found = _import(parts[0], path, key)
    for end, name in enumerate(parts[1:], start=2):
        if not hasattr(found, name) and isinstance(found, types.ModuleType):
            _import(".".join(parts[:end]), path, key, parent=found)
        if not hasattr(found, name):
            raise UserError(f"{key}={path} does not exist: {'.'.join(parts[: end - 1])} has no {name!r}")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"{key}={path} is a {type(found).__name__}, not a class or function")
    return found


def _import(module: str, path: str, key: str, parent: types.ModuleType | None = None) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise UserError(f"{key}={path} cannot be imported: {error}") from error
        name = module.rpartition(".")[2]
        if parent is None:
            raise UserError(f"{key}={path} does not exist: no module named {name!r}") from error
        near = did_you_mean(name, [n for n, value in vars(parent).items() if callable(value) and n[0] != "_"])
        hint = near if "did you mean" in near else ""
        raise UserError(f"{key}={path} does not exist: no {name!r} in {parent.__name__}{hint}") from error
    except Exception as error:  # whatever a user's module does while it is imported
        raise UserError(f"{key}={path} cannot be imported: {type(error).__name__}: {error}") from error


def build(tree: Any, key: str, extra: Mapping[str, Any] | None = None) -> Any:
    """Build the objects that a plain tree of dicts and lists names, innermost first.

    A dict with `_target_` becomes a call of it with the other entries as arguments; `_partial_: true` binds
    them instead. A dict whose `_target_` is null becomes None. All else stays as it is.

    Args:
        tree: plain Python containers and values.
        key: where the tree stands in the config, for messages.
        extra: further arguments of the outermost call, passed as they are.

    Raises:
        UserError: no such target, a wrong argument, or the target refused its arguments.

    """
    if isinstance(tree, list):
        return [build(value, f"{key}[{i}]") for i, value in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if "_target_" not in tree:
        return {name: build(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()}
    if tree["_target_"] is None:
        return None
    arguments = {name: build(value, f"{key}.{name}") for name, value in tree.items() if name not in _RESERVED}
    target = locate(tree["_target_"], f"{key}._target_")
    return construct(target, {**arguments, **(extra or {})}, key, partial=bool(tree.get("_partial_", False)))


_RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_"}


def construct(target: Callable[..., Any], arguments: Mapping[str, Any], key: str = "", *, partial: bool = False) -> Any:
    """Call a target after checking its arguments against its signature and annotations.

    Lists become tuples, integers floats and text paths where the annotation says so; what the annotations do
    not settle is passed as it is.

    Args:
        target: class or function.
        arguments: by name, plain values or built objects.
        key: where the target stands in the config ("partition"), for messages; "" for the top.
        partial: bind the arguments instead of calling.

    Raises:
        UserError: an argument that is unknown, missing or of a wrong type, or a ValueError, TypeError, OSError or
            ImportError of the target itself.

    """
    checked = _check_arguments(target, arguments, key, partial=partial)
    if partial:
        return functools.partial(target, **checked)
    try:
        return target(**checked)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(_owned(str(error), key, arguments)) from error
    except (TypeError, OSError, ImportError) as error:
        where = f"{key}: " if key else ""
        raise UserError(f"{where}{_name(target)} failed: {type(error).__name__}: {error}") from error


def _check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], key: str, *, partial: bool
) -> dict[str, Any]:
    try:
        parameters = inspect.signature(target).parameters
    except (ValueError, TypeError):  # some builtins have no signature
        return dict(arguments)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    dot = f"{key}." if key else ""
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments.keys() - named.keys():
            hint = did_you_mean(str(name), named.keys() - arguments.keys())
            raise UserError(f"{dot}{name}: {_name(target)} takes no such argument{hint}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing and not partial:
        names = ", ".join(missing)
        raise UserError(f"{key}: {_name(target)} needs {names}" if key else f"{names} must have a value")
    hints = _hints(target)
    checked = {}
    for name, value in arguments.items():
        if isinstance(value, str) and value == "???":  # Hydra's word for a value that only the user knows
            raise UserError(f"{dot}{name} is needed and has no default: write {dot}{name}=VALUE")
        hint = hints.get(name, Any)
        try:
            checked[name] = _coerce(hint, value)
        except _Mismatch:
            raise UserError(f"{dot}{name} must be {_describe(hint)}, got {value!r}") from None
    return checked


def _owned(message: str, key: str, arguments: Mapping[str, Any]) -> str:
    """Put the key before a message: "alpha must be …" becomes "partition.alpha must be …"."""
    if not key or message.startswith(key):
        return message
    return f"{key}.{message}" if message.split(" ", 1)[0] in arguments else f"{key}: {message}"


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", repr(target))


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations that only a type checker can resolve
        return {}


def _coerce(hint: Any, value: Any) -> Any:
    """Return the value as the annotation wants it, or raise _Mismatch; unknown annotations accept all."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for member in args:
            try:
                return _coerce(member, value)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is typing.Annotated:
        return _coerce(args[0], value)
    if origin is Literal:
        return _require(any(value == a and type(value) is type(a) for a in args), value)
    if hint is None or hint is type(None):
        return _require(value is None, value)
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return _require(number or _is_array_scalar(value), value) if hint is int or not number else float(value)
    if hint in (bool, str):
        return _require(isinstance(value, hint), value)
    if hint is Path:
        return Path(value) if isinstance(value, str) else _require(isinstance(value, Path), value)
    return _coerce_container(origin or hint, args, value)


def _coerce_container(kind: Any, args: tuple[Any, ...], value: Any) -> Any:
    if kind in (tuple, list, Sequence, set, frozenset, AbstractSet):
        _require(isinstance(value, (list, tuple, set, frozenset)), value)
        if kind is tuple and len(args) > 1 and args[-1] is not Ellipsis:
            _require(len(args) == len(value), value)
            return tuple(_coerce(a, v) for a, v in zip(args, value, strict=True))
        items = [_coerce(args[0] if args else Any, v) for v in value]
        return tuple(items) if kind in (tuple, Sequence) else kind(items) if kind in (set, frozenset) else items
    if kind in (dict, Mapping):
        _require(isinstance(value, Mapping), value)
        key_hint, value_hint = args or (Any, Any)
        return {_coerce(key_hint, k): _coerce(value_hint, v) for k, v in value.items()}
    return value


def _require(holds: bool, value: Any) -> Any:
    if not holds:
        raise _Mismatch
    return value


def _is_array_scalar(value: Any) -> bool:
    return hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "shape", None) == ()


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path", Any: "anything"}


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in sorted(args, key=lambda a: a is type(None)))
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if hint is None or hint is type(None):
        return "null"
    if origin in (tuple, list, Sequence, set, frozenset, AbstractSet):
        items = [a for a in args if a is not Ellipsis]
        return f"a list of {_describe(items[0]).split(' ', 1)[-1]}s" if len(items) == 1 else f"a list of {len(items)}"
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return "a table of name: value"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
