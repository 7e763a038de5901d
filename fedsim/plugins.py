"""Third parties' packages: entry points of the group `fedsim.plugins` that add choices to any config group.

    [project.entry-points."fedsim.plugins"]
    geofed = "geofed.configs"        # a folder of the package, with strategy/geo.yaml, client/geo.yaml, …

Nothing of a plug-in is imported to find its YAML files; its classes are when a run's `_target_` names them. So a
plug-in that cannot be imported, or has no such folder, costs one warning with its name, and stops nobody.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from fedsim.errors import UserError

GROUP = "fedsim.plugins"


class Plugin(NamedTuple):
    """A package that adds choices."""

    name: str  # of its entry point
    origin: str  # its distribution and version, as `pip list` shows them
    folder: Path  # holds a folder for each config group

    @property
    def choices(self) -> list[str]:
        """Its choices as they are written, e.g. "strategy=geo"; files that begin with "_" are parts of others."""
        found = (path.relative_to(self.folder).with_suffix("").as_posix() for path in self.folder.rglob("*.yaml"))
        return sorted(name.replace("/", "=", 1) for name in found if "/" in name and "/_" not in name)


@cache
def installed() -> tuple[tuple[Plugin, ...], tuple[str, ...]]:
    """Return the plug-ins by name, and one line for each that is broken or adds a name that is taken."""
    from importlib.metadata import entry_points  # here: most of the time is spent on reading what is installed

    found: dict[str, Plugin] = {}
    warnings: list[str] = []
    taken: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name in found:
            continue  # the same package twice on the path: the first counts, as it does for imports
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.name
        try:
            plugin = Plugin(entry.name, origin, _folder(entry.value))
        except Exception as error:  # whatever a foreign finder does
            first = (str(error).splitlines() or [""])[0] or type(error).__name__
            warnings.append(f"plug-in {entry.name} ({origin}) is broken and left out: {first}")
            continue
        found[entry.name] = plugin
        for choice in plugin.choices:
            owner = "fedsim" if _is_own(choice) else taken.setdefault(choice, origin)
            if owner != origin:
                warnings.append(f"plug-in {entry.name} ({origin}): {choice} is {owner}'s own; that one is taken")
    return tuple(found.values()), tuple(warnings)


def _folder(package: str) -> Path:
    """Return the folder of a package without importing it, where its top-level package says where it is."""
    top, *rest = package.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ValueError(f"{package}: no module named {top!r}")
    for location in spec.submodule_search_locations or ():
        folder = Path(location, *rest)
        if folder.is_dir():
            return _checked(folder, package)
    nested = importlib.util.find_spec(package)  # a package whose folders are mapped elsewhere; imports its parents
    for location in (nested.submodule_search_locations or ()) if nested else ():
        return _checked(Path(location), package)
    raise ValueError(f"{package} is no folder of the package {top}")


def _checked(folder: Path, package: str) -> Path:
    if not Plugin("", "", folder).choices:
        raise ValueError(f"{package} ({folder}) holds no choices such as strategy/name.yaml")
    return folder


def _is_own(choice: str) -> bool:
    group, _, name = choice.partition("=")
    return files("fedsim.configs").joinpath(group, f"{name}.yaml").is_file()


def origin_of(file: object) -> str:
    """Return the origin of the plug-in that a YAML file belongs to; "" for fedsim's and the user's own."""
    owners = [
        plugin.origin for plugin in installed()[0] if isinstance(file, Path) and file.is_relative_to(plugin.folder)
    ]
    return owners[0] if owners else ""


def search_path(config_dir: Path | None = None) -> list[str]:
    """Return the override that makes Hydra find the choices of a folder and of all plug-ins, behind fedsim's own.

    Raises:
        UserError: a path that Hydra's grammar cannot hold.

    """
    folders = [*([config_dir.resolve()] if config_dir else []), *(plugin.folder for plugin in installed()[0])]
    for folder in folders:
        if "\n" in str(folder):
            raise UserError(f"{str(folder)!r}: a folder of choices has no line break in its name")
    listed = ",".join("'file://" + str(folder).replace("'", "\\'") + "'" for folder in folders)
    return [f"hydra.searchpath=[{listed}]"] if folders else []


def help_text() -> str:
    """Return what the help says of plug-ins: nothing where there are none."""
    lines = [f"  {plugin.origin}: {' '.join(plugin.choices)}" for plugin in installed()[0]]
    return "\n".join(["plug-ins:", *lines]) if lines else ""
