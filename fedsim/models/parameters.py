"""Which parameters of a model travel, which stay with a client, which never move; and where they start."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.rng import keyed_bits

Patterns = str | list[str] | None


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Every parameter of a model in exactly one of three parts, each in the model's own order."""

    shared: Layout  # what travels: the columns of a cohort's updates
    local: Layout  # trained, and kept in a client's state
    frozen: tuple[str, ...]  # never trained
    buffers: Layout  # persistent buffers (running statistics), integer ones too


def split_parameters(model: nn.Module, *, trainable: Patterns = None, local: Patterns = None) -> Parameters:
    r"""Split a model's parameters by name.

    Patterns are regular expressions, found anywhere in a name (`re.search`): `head` matches "head.weight" and
    "overhead.bias", `^head\.` only the first. Tied parameters are one parameter, under the first of their names,
    and match if any of their names does.

    Args:
        model: any module.
        trainable: what moves; all else is frozen. None: what has `requires_grad`.
        local: of what moves, what stays with each client ("personal" parameters). None: nothing.

    Returns:
        The parts; the model is not changed.

    Raises:
        UserError: a pattern that matches no parameter, or nothing left to train.

    """
    aliases = tied_names(model)
    named = dict(model.named_parameters())
    names = [alias for group in aliases.values() for alias in group]
    moves, stays = _matcher("trainable", trainable, names), _matcher("local", local, names)
    free = [
        name for name, p in named.items() if (p.requires_grad if trainable is None else any(map(moves, aliases[name])))
    ]
    personal = [name for name in free if any(map(stays, aliases[name]))]
    if local is not None and not personal:
        raise UserError(f"model.local={local!r} matches only frozen parameters; widen model.trainable={trainable!r}")
    shared = [name for name in free if name not in set(personal)]
    if not shared and not personal:
        raise UserError(
            f"no parameter is left to train: {len(named) - len(free)} of {len(named)} are frozen "
            f"(model.trainable={trainable!r})"
        )
    return Parameters(
        shared=Layout.of({name: named[name] for name in shared}),
        local=Layout.of({name: named[name] for name in personal}),
        frozen=tuple(name for name in named if name not in set(free)),
        buffers=Layout.of(persistent_buffers(model)),
    )


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return first name → all names of each parameter, in the model's order."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: tuple(group) for name, group in names.items()}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a `state_dict` holds, each once."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _matcher(argument: str, patterns: Patterns, names: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a name is matched by any pattern, after checking that each matches something."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    names = list(names)
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"model.{argument}={pattern!r} is not a regular expression: {error}") from None
        if not found:
            plain = re.sub(r"[^\w.]|\\.", "", pattern.replace(r"\.", "."))
            near = difflib.get_close_matches(plain, names, n=5, cutoff=0.0)
            raise UserError(f"model.{argument}={pattern!r} matches no parameter; names near it: {', '.join(near)}")
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def initialise(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model whose weights are a function of (seed, "model") alone.

    It is built on the CPU in float32 from torch's CPU generator, keyed and put back afterwards: neither the device,
    the dtype nor what ran before changes a weight, and float64 weights are float32 ones cast up.

    Args:
        factory: called once, without arguments; must draw from torch's generator only.
        seed: `model.seed`, or the run's seed where that is null; ≥ 0.

    Returns:
        The module, on the CPU.

    Raises:
        UserError: the factory returned something else.

    """
    with _keyed_generator(seed):
        model = factory()
    if not isinstance(model, nn.Module):
        raise UserError(f"model._target_ must return an nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def _keyed_generator(seed: int) -> Iterator[None]:
    """Key torch's global CPU generator and defaults for a while: initialisers of layers take no generator."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(int(keyed_bits(seed, "model")) >> 1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def load_init(model: nn.Module, path: str | Path) -> None:
    """Set a model's parameters and persistent buffers from a `.safetensors` file (`model.init=PATH`), in place.

    Names and shapes must be the model's own. Only `head.*` may be missing as a whole: a backbone trained on other
    classes, whose new head keeps its initial weights. Values are cast to the model's dtype.

    Args:
        model: the module as built.
        path: a file that any tool wrote; no pickle is read.

    Raises:
        UserError: no such file, not that format, a name missing or left over, or a shape that differs.

    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model.init={path}: no such file")
    try:
        stored = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"model.init={path} is not a .safetensors file that can be read: {error}") from None
    aliases = {alias: name for name, group in tied_names(model).items() for alias in group}
    own = dict(model.named_parameters()) | persistent_buffers(model)
    given = {aliases.get(name, name): value for name, value in stored.items()}
    missing = [name for name in own if name not in given]
    if missing and all(name.startswith("head.") for name in missing) and not any(n.startswith("head.") for n in given):
        missing = []
    extra = [name for name in stored if aliases.get(name, name) not in own]
    if missing or extra:
        raise UserError(
            f"model.init={path} is of another model: "
            + "; ".join(f"{what} {_few(names)}" for what, names in (("lacks", missing), ("has also", extra)) if names)
        )
    _check_shapes(path, own, given)
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def _check_shapes(path: Path, own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    wrong = [name for name, tensor in own.items() if name in given and given[name].shape != tensor.shape]
    if not wrong:
        return
    first = wrong[0]
    shapes = f"{first} has shape {tuple(given[first].shape)} in the file, {tuple(own[first].shape)} in the model"
    cure = "; leave head.* out of the file to start with a new head" if first.startswith("head.") else ""
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise UserError(f"model.init={path}: {shapes}{others}{cure}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
