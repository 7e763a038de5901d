"""The arrows of docs/architecture.md, held on the source: who may import what, no global randomness, no pickle."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fedsim", "strategies", "clients")

# From the bottom up; a module imports from its own layer and those below. A module that is not named is held by the
# other rules alone.
STACK = (
    ("errors", "files", "layout", "rng", "scripted", "place", "mapped", "linalg", "order", "ascent", "contracts"),
    (
        "local",
        "samplers",
        "devices",
        "clock",
        "settings",
        "models",
        "partition",
        "data",
        "shift",
        "metrics",
        "strategies",
        "clients",
    ),
    ("engine",),
    (
        "backend",
        "modes",
        "dispatch",
        "evaluation",
        "experiment",
        "flower",
        "checkpoint",
        "console",
        "folder",
        "plan",
        "stopping",
    ),
    ("loop",),
    (
        "catalogue",
        "composition",
        "construct",
        "misfit",
        "config",
        "saved",
        "timing",
        "build",
        "build_data",
        "build_model",
        "build_uplink",
    ),
    ("simulation", "drawn", "chorus", "together", "replicas", "sweep", "report"),
    ("actions", "verbs", "testing"),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, layer in enumerate(STACK) for name in layer}

METHOD_IMPORTS = (
    "torch", "numpy", "fedsim.contracts", "fedsim.linalg", "fedsim.mapped", "fedsim.order", "fedsim.layout",
    "fedsim.rng", "fedsim.ascent",
)  # fmt: skip
CONFIG_MODULES = {
    f"fedsim/{name}.py"
    for name in ("cli", "composition", "config", "build", "simulation", "catalogue", "testing", "sweep/grammar")
}
PUBLIC_FLWR = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
FLWR_INTERNALS = "fedsim/flower/runtime.py"

# File → why it may touch a global generator.
GLOBAL_RNG = {
    "fedsim/models/parameters.py": "layers' initialisers take no generator; forked, keyed and put back",
    "fedsim/flower/runtime.py": "foreign strategies and clients draw from them; keyed and put back",
    "fedsim/flower/state.py": "captures what a foreign strategy holds",
}
INITIALISERS = "fedsim/models/"  # constructors run under the keyed generator of models/parameters.py
OWN_NUMPY_RNG = {"default_rng", "Generator", "PCG64", "Philox", "SeedSequence", "BitGenerator"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
               "multinomial", "normal", "poisson"}  # fmt: skip
TORCH_GLOBAL = {"torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.default_generator",
                "torch.get_rng_state", "torch.initial_seed", "torch.manual_seed", "torch.seed",
                "torch.set_rng_state"}  # fmt: skip
TENSOR_DRAWS = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_"}
# File → why it may pickle.
PICKLES = {"fedsim/engine/parcel.py": "what a run sends its own workers; nothing comes from a file"}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLE_CALLS = {"torch.load", "torch.save", "pandas.read_pickle"}


class Source:
    """One module: what it imports and which dotted names it uses."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.tree = path, ast.parse(text, path)
        parts = Path(path).with_suffix("").parts
        parts = parts if parts[0] == "fedsim" else ("fedsim", *parts)
        self.package = parts[:-1]
        self.unit = parts[1] if len(parts) > 1 else ""  # what STACK names
        self.imports = list(self._imports())
        self.aliases = dict(self._aliases())

    def _imports(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{self._base(node)}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and _dotted(node.func) in ("importlib.import_module", "__import__"):
                yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        base = self.package[: len(self.package) - node.level + 1]
        return ".".join((*base, node.module) if node.module else base)

    def _aliases(self) -> Iterator[tuple[str, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (
                    (a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names
                )
            elif isinstance(node, ast.ImportFrom):
                yield from ((a.asname or a.name, f"{self._base(node)}.{a.name}") for a in node.names)

    def names(self) -> Iterator[tuple[ast.expr, str]]:
        """Yield attribute chains with the import they start from spelled out, e.g. `np.random.rand` as numpy's."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute | ast.Name):
                head, _, rest = _dotted(node).partition(".")
                if head in self.aliases:
                    yield node, f"{self.aliases[head]}.{rest}" if rest else self.aliases[head]

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                head, _, rest = _dotted(node.func).partition(".")
                full = self.aliases.get(head, head)
                yield node, f"{full}.{rest}" if rest else full


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def bare_names(source: Source) -> Iterator[str]:
    for line, name in source.imports:
        if _within(name, "strategies", "clients", "configs"):
            yield f"{source.path}:{line}: {name}: installed it is fedsim.{name}; users have folders of that name"


def methods_stay_small(source: Source) -> Iterator[str]:
    own = source.path.split("/")[0]
    if own not in ("strategies", "clients"):
        return
    for line, name in source.imports:
        standard = name.split(".")[0] in sys.stdlib_module_names
        if not standard and not _within(name, *METHOD_IMPORTS, f"fedsim.{own}"):
            yield f"{source.path}:{line}: a method imports torch, numpy, the contracts and linalg, not {name}"


def machine_knows_no_method(source: Source) -> Iterator[str]:
    if source.path.startswith("fedsim/"):
        for line, name in source.imports:
            if _within(name, "fedsim.strategies", "fedsim.clients"):
                yield f"{source.path}:{line}: {name} comes in by _target_, as a third party's plug-in does"


def flower_is_a_shell(source: Source) -> Iterator[str]:
    for line, name in source.imports:
        if not _within(name, "flwr") or source.path == FLWR_INTERNALS:
            continue
        if not source.path.startswith("fedsim/flower/"):
            yield f"{source.path}:{line}: flwr is imported in fedsim/flower/ only"
        elif not _within(name, *PUBLIC_FLWR):
            yield f"{source.path}:{line}: {name} is not public; keep it in {FLWR_INTERNALS}"
        elif any(part.startswith("_") for part in name.split(".")):
            yield f"{source.path}:{line}: {name} is private; keep it in {FLWR_INTERNALS}"


def config_stays_above(source: Source) -> Iterator[str]:
    for line, name in source.imports:
        if _within(name, "hydra", "omegaconf") and source.path not in CONFIG_MODULES:
            yield f"{source.path}:{line}: {name}: parts receive plain arguments"


def imports_point_downward(source: Source) -> Iterator[str]:
    rank = RANK.get(source.unit)
    for line, name in source.imports:
        parts = name.split(".")
        target = RANK.get(parts[1]) if parts[0] == "fedsim" and len(parts) > 1 else None
        if rank is not None and target is not None and target > rank:
            yield f"{source.path}:{line}: {name} is above {source.unit}"


def no_pickle(source: Source) -> Iterator[str]:
    if source.path in PICKLES:
        return
    for line, name in source.imports:
        if name.split(".")[0] in PICKLERS or name in PICKLE_CALLS:
            yield f"{source.path}:{line}: {name} loads or writes pickles"
    for call, name in source.calls():
        allowed = any(k.arg == "allow_pickle" and getattr(k.value, "value", True) is not False for k in call.keywords)
        if name in PICKLE_CALLS or allowed:
            yield f"{source.path}:{call.lineno}: {name} loads or writes pickles"


def no_global_randomness(source: Source) -> Iterator[str]:
    if source.path in GLOBAL_RNG:
        return
    for line, name in source.imports:
        if _within(name, "random"):
            yield f"{source.path}:{line}: Python's random has one global state"
    for node, name in source.names():
        numpy_global = name.startswith("numpy.random.") and name.split(".")[2] not in OWN_NUMPY_RNG
        if name in TORCH_GLOBAL or _within(name, "torch.random") or numpy_global:
            yield f"{source.path}:{node.lineno}: {name} is global randomness; take an rng or a key"
    for call, name in source.calls():
        head, _, last = name.rpartition(".")
        keyed = any(k.arg == "generator" for k in call.keywords)
        # A method may hang on any expression, whose dotted name is then empty at the front.
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        draws = method in TENSOR_DRAWS and not source.path.startswith(INITIALISERS)
        if name == "numpy.random.default_rng" and not call.args and not call.keywords:
            yield f"{source.path}:{call.lineno}: {name}() takes its seed from the system; take an rng or a key"
        if not keyed and (draws or (head == "torch" and last in TORCH_DRAWS)):
            yield f"{source.path}:{call.lineno}: {method or name} without generator= draws from the global generator"


RULES = (
    bare_names,
    methods_stay_small,
    machine_knows_no_method,
    flower_is_a_shell,
    config_stays_above,
    imports_point_downward,
    no_pickle,
    no_global_randomness,
)


@cache
def _sources(*folders: str) -> list[Source]:
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_layers(rule):
    found = [violation for source in _sources(*FOLDERS) for violation in rule(source)]
    assert not found, "\n" + "\n".join(found)


def test_bare_names_are_imported_nowhere():
    found = [v for source in _sources("tests", "benchmarks", "docs") for v in bare_names(source)]
    assert not found, "\n" + "\n".join(found)


def test_every_yaml_says_what_it_is():
    silent = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        if not first.startswith("# ") or len(first) < 10:
            silent.append(f"{path.relative_to(ROOT)}: {first!r}")
    assert not silent, "\n".join(silent)


PLANTED = [
    (bare_names, "fedsim/build.py", "import strategies.fedavg"),
    (bare_names, "clients/x.py", "from configs import y"),
    (bare_names, "fedsim/build.py", "import importlib\nimportlib.import_module('clients.sgd')"),
    (methods_stay_small, "strategies/x.py", "from flwr.app import Message"),
    (methods_stay_small, "strategies/x.py", "from fedsim.engine.task import Job"),
    (methods_stay_small, "clients/x.py", "def f():\n    import omegaconf"),
    (methods_stay_small, "clients/x.py", "from ..engine import task"),
    (methods_stay_small, "clients/x.py", "from fedsim.strategies.fedavg import FedAvg"),
    (machine_knows_no_method, "fedsim/loop.py", "from fedsim.strategies.fedld import FedLD"),
    (machine_knows_no_method, "fedsim/loop.py", "from fedsim import clients"),
    (machine_knows_no_method, "fedsim/loop.py", "from .strategies import fedld"),
    (machine_knows_no_method, "fedsim/engine/task.py", "from ..clients import sgd"),
    (flower_is_a_shell, "fedsim/loop.py", "import flwr"),
    (flower_is_a_shell, "fedsim/flower/grid.py", "from flwr.supercore.run import Run"),
    (flower_is_a_shell, "fedsim/flower/grid.py", "from flwr.app._x import y"),
    (config_stays_above, "fedsim/engine/task.py", "from omegaconf import DictConfig"),
    (config_stays_above, "fedsim/loop.py", "import hydra.utils as u"),
    (imports_point_downward, "fedsim/metrics/drift.py", "from fedsim.engine.task import Job"),
    (imports_point_downward, "fedsim/rng.py", "import fedsim.contracts, fedsim.loop"),
    (imports_point_downward, "fedsim/loop.py", "from fedsim.cli import main"),
    (no_pickle, "fedsim/checkpoint.py", "import pickle"),
    (no_pickle, "fedsim/checkpoint.py", "import torch as t\nt.load('x')"),
    (no_pickle, "fedsim/checkpoint.py", "from torch import load"),
    (no_pickle, "fedsim/data/npz.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (no_pickle, "fedsim/data/npz.py", "import numpy as np\nnp.load('x', allow_pickle=flag)"),
    (no_global_randomness, "fedsim/loop.py", "import torch\ntorch.manual_seed(0)"),
    (no_global_randomness, "fedsim/loop.py", "import torch\ntorch.cuda.manual_seed_all(0)"),
    (no_global_randomness, "fedsim/loop.py", "import numpy as np\nnp.random.seed(0)"),
    (no_global_randomness, "fedsim/loop.py", "from numpy.random import default_rng\nrng = default_rng()"),
    (no_global_randomness, "fedsim/loop.py", "import random\nrandom.seed(0)"),
    (no_global_randomness, "strategies/x.py", "import torch\nx = torch.randn(3)"),
    (no_global_randomness, "strategies/x.py", "import torch\nx = torch.zeros(3).normal_()"),
    (no_global_randomness, "strategies/x.py", "from torch import randperm\nrandperm(3)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_planted_violation_is_found(rule, path, text):
    assert list(rule(Source(path, text)))


ALLOWED = [
    ("strategies/x.py", "import math\nimport torch\nfrom fedsim.rng import generator\nfrom .y import Z"),
    ("clients/x.py", "from .cross_entropy import CrossEntropy\nimport torch.nn.functional as F"),
    ("fedsim/flower/grid.py", "from flwr.serverapp import Grid\nfrom fedsim.contracts import Cohort"),
    ("fedsim/flower/runtime.py", "import random\nfrom flwr.supercore.run import Run\nrandom.seed(0)"),
    ("fedsim/config.py", "from omegaconf import OmegaConf\nfrom importlib.resources import files\nfiles('configs')"),
    ("fedsim/engine/task.py", "import numpy as np\nnp.random.default_rng(1)\nnp.load('x', allow_pickle=False)"),
    ("fedsim/engine/store.py", "import torch\ntorch.rand(3, generator=torch.Generator().manual_seed(1))"),
    ("fedsim/models/mlp.py", "import torch\ntorch.empty(3).uniform_(-1, 1)"),
    ("fedsim/loop.py", "from fedsim.errors import UserError\nfrom fedsim import checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_what_is_allowed_is_not_reported(path, text):
    assert not [violation for rule in RULES for violation in rule(Source(path, text))]
