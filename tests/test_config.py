"""Composing a config: what comes out of right input, and the one line that wrong input gets."""

import re
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fedsim import catalogue
from fedsim.config import compose, from_tree, instantiate, notes, plain, settings, to_yaml
from fedsim.errors import UserError
from fedsim.saved import amend, claim_run_dir, load

OPTIONS = {group: list(catalogue.options(group, catalogue.roots())) for group in catalogue.groups(catalogue.roots())}
COLUMNS = list(zip_longest(*OPTIONS.values()))  # the i-th choice of every group, so that few compositions try all

# (overrides, parts of the message): what was wrong, what was expected, the nearest right name.
WRONG = {
    "choice misspelt": (["strategy=fedavgg"], ["no strategy 'fedavgg'", "did you mean 'fedavg'"]),
    "choice in the wrong case": (["strategy=FedLD"], ["'FedLD'", "did you mean 'fedld'"]),
    "choice unlike any": (["model=3"], ["no model '3'", "known:", "mlp"]),
    "choice of many": (["strategy=zzzz"], ["no strategy 'zzzz'", "fedsim list strategy"]),
    "choice in a folder": (["strategy=multikrum"], ["did you mean 'flower/multikrum'"]),
    "folder as a choice": (["strategy=flower"], ["it is a folder", "flower/"]),
    "folder as a group": (["strategy/flower=krum"], ["strategy=flower/krum"]),
    "choice outside its group": (["client=../strategy/fedavg"], ["no client '../strategy/fedavg'"]),
    "part of other files": (["client=_training"], ["no client '_training'", "sgd"]),
    "choice empty": (["strategy="], ["strategy needs a name"]),
    "choice null": (["strategy=null"], ["strategy needs a name"]),
    "choice as a list": (["strategy=[fedavg,fedld]"], ["no strategy"]),
    "choice added": (["+strategy=fedld"], ["strategy=fedld", "without '+'"]),
    "group misspelt": (["patition=iid"], ["no setting or group 'patition'", "did you mean 'partition'"]),
    "group deleted": (["~strategy"], ["strategy is missing", "strategy=fedavg"]),
    "group of no default": (["+experiment=nix"], ["no experiment 'nix'", "see fedsim list experiment"]),
    "key misspelt": (["partition.alpah=1"], ["partition=dirichlet has no setting 'alpah'", "did you mean 'alpha'"]),
    "key unlike any": (["strategy.rnk=3"], ["strategy=fedavg has no setting 'rnk'", "server_lr"]),
    "key of a nested table": (["checkpoint.kep=3"], ["checkpoint has no setting 'kep'", "'keep'"]),
    "key without its group": (["lr=0.1"], ["no setting or group 'lr'", "did you mean client.lr"]),
    "key below a value": (["client.lr.x=3"], ["client.lr is a value, 0.3"]),
    "key added at the top": (["+sede=3"], ["no setting or group 'sede'", "'seed'"]),
    "key added though there": (["+seed=3"], ["seed exists already", "without '+'"]),
    "key deleted that is not": (["~foo"], ["no setting or group 'foo'"]),
    "key needed and deleted": (["~seed"], ["seed must have a value"]),
    "table deleted": (["~early_stopping"], ["early_stopping is a group", "early_stopping.patience"]),
    "table as a value": (["early_stopping=3"], ["early_stopping is a group", "early_stopping.patience"]),
    "text for an integer": (["seed=x"], ["seed must be an integer, got 'x'"]),
    "word for an integer": (["num_rounds=ten"], ["num_rounds must be an integer, got 'ten'"]),
    "fraction for an integer": (["num_rounds=1.5"], ["num_rounds must be an integer, got 1.5"]),
    "float for an integer": (["seed=1e3"], ["seed must be an integer, got 1000.0"]),
    "truth for an integer": (["seed=true"], ["seed must be an integer, got True"]),
    "nothing for an integer": (["num_rounds=null"], ["num_rounds must be an integer, got None"]),
    "quoted for an integer": (["seed='1'"], ["seed must be an integer, got '1'"]),
    "number for text": (["resume=3"], ["resume must be text or null, got 3"]),
    "literal": (["dtype=float16"], ["dtype must be one of float32, float64, got 'float16'"]),
    "policy": (["on_bad_update=ignore"], ["on_bad_update must be one of drop, raise"]),
    "device": (["device=gpu"], ["device must be auto, cpu, cuda", "'gpu'"]),
    "rounds below 1": (["num_rounds=0"], ["num_rounds must be >= 1, got 0"]),
    "fraction above 1": (["fraction=2"], ["fraction must be in (0, 1]", "got 2"]),
    "fraction 0": (["fraction=0"], ["fraction must be in (0, 1]", "got 0"]),
    "fraction not a number": (["fraction=nan"], ["fraction must be in (0, 1]", "got nan"]),
    "seed below 0": (["seed=-1"], ["seed must be >= 0", "got -1"]),
    "seed too large": (["seed=9223372036854775808"], ["seed must be", "below 2^63"]),
    "attack's seed below 0": (["attack=sign_flip", "attack.seed=-1"], ["attack.seed must be", "or null", "got -1"]),
    "partition's seed broken": (["partition.seed=1.5"], ["partition.seed must be an integer", "got 1.5"]),
    "model's seed a truth": (["model.seed=true"], ["model.seed must be an integer", "got True"]),
    "threads 0": (["threads=0"], ["threads must be >= 1", "got 0"]),
    "accuracy in percent": (["target_accuracy=95"], ["target_accuracy must be in (0, 1]", "got 95"]),
    "patience 0": (["early_stopping.patience=0"], ["early_stopping.patience must be >= 1", "got 0"]),
    "min_delta infinite": (["early_stopping.min_delta=inf"], ["early_stopping.min_delta must be >= 0 and finite"]),
    "keep 0": (["checkpoint.keep=0"], ["checkpoint.keep must be >= 1, got 0"]),
    "every 0": (["checkpoint.every=0"], ["checkpoint.every must be >= 1", "got 0"]),
    "several values": (["seed=1,2"], ["one value of seed", "seed=[1,2]"]),
    "decimal comma": (["client.lr=0,1"], ["one value of client.lr"]),
    "range": (["seed=range(3)"], ["one value of seed"]),
    "twice": (["seed=1", "seed=2"], ["seed is given twice: seed=1 and seed=2"]),
    "group twice": (["strategy=fedavg", "strategy=fedld"], ["strategy is given twice"]),
    "no equals sign": (["num_rounds"], ["'num_rounds' sets nothing", "name=value"]),
    "choice without its group": (["fedld"], ["did you mean strategy=fedld"]),
    "colon": (["strategy:fedld"], ["'strategy:fedld' sets nothing", "name=value"]),
    "no name": (["=3"], ["'=3'", "name=value"]),
    "no name to add": (["+=3"], ["'+=3'", "name=value"]),
    "empty text": ([""], ["sets nothing"]),
    "space before the sign": (["seed = 3"], ["'seed '", "name=value"]),
    "two dots": (["client..lr=1"], ["'client..lr'"]),
    "number as a name": (["1=2"], ["'1'", "name=value"]),
    "open bracket": (["model.hidden=[1"], ["a bracket is not closed"]),
    "open quote": (["data.root='a"], ["a quotation mark is not closed"]),
    "character to quote": (["data.root=~/x"], ["""'data.root="~/x"'"""]),
    "interpolation of nothing": (["seed=${foo}"], ["seed=${foo}", "'foo' not found"]),
    "interpolation in a circle": (["seed=${seed}"], ["seed=${seed}"]),
    "unknown resolver": (["seed=${nix:1}"], ["seed=${nix:1}"]),
    "table with a wrong key": (["partition={alph:1}"], ["partition={alph:1}"]),
    "Hydra's settings": (["hydra.verbose=true"], ["only hydra.run.dir"]),
    "Hydra's groups": (["hydra/launcher=joblib"], ["only hydra.run.dir"]),
    "run folder empty": (["hydra.run.dir="], ["hydra.run.dir must be a path"]),
    "other package": (["strategy@foo=fedavg"], ["strategy@foo"]),
}


@pytest.mark.parametrize(("overrides", "parts"), WRONG.values(), ids=WRONG)
def test_wrong_input_gets_one_line_that_names_it(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for part in parts:
        assert part in message


def test_defaults_are_the_names_users_script_against() -> None:
    config = compose([])
    assert (config.num_rounds, config.fraction, config.seed, config.dtype) == (100, 0.5, 0, "float32")
    assert (config.partition.alpha, config.partition.num_clients) == (0.5, 20)
    assert (config.client.batch_size, config.client.lr) == (20, 0.3)
    chosen = {"strategy": "fedavg", "client": "sgd", "data": "digits", "partition": "dirichlet", "model": "mlp"}
    assert chosen.items() <= dict(config.hydra.runtime.choices).items()


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: "-".join(filter(None, column[:5])))
def test_every_choice_composes(column: tuple[str | None, ...]) -> None:
    chosen = {group: name for group, name in zip(OPTIONS, column, strict=True) if name is not None}
    known = catalogue.defaults()
    config = compose([f"{'' if group in known else '+'}{group}={name}" for group, name in chosen.items()])
    assert chosen.items() <= dict(config.hydra.runtime.choices).items()


def test_overrides_win_and_types_are_kept() -> None:
    config = compose(["strategy=fedld", "partition.alpha=0.1", "seed=7", "+data.note='a b'", "target_accuracy=1"])
    assert config.strategy._target_ == "fedsim.strategies.fedld.FedLD"
    assert config.client._target_ == "fedsim.clients.margin.Margin"  # the strategy's own pairing
    assert (config.partition.alpha, config.seed, config.data.note) == (0.1, 7, "a b")
    run = settings(config)
    assert run.seed == 7
    assert isinstance(run.target_accuracy, float)
    assert run.checkpoint.keep == 2


def test_interpolations_are_resolved() -> None:
    config = compose(["num_rounds=9", "seed=${num_rounds}"])
    assert OmegaConf.to_container(config, resolve=False)["seed"] == 9


def test_a_users_client_wins_over_the_pairing_and_is_noted() -> None:
    config = compose(["strategy=fedld", "client=sgd"])
    assert config.client._target_ == "fedsim.clients.cross_entropy.CrossEntropy"
    (note,) = notes(config)
    assert all(part in note for part in ("strategy=fedld", "client=margin", "client=sgd"))
    assert notes(compose(["strategy=fedld"])) == []
    assert notes(compose(["strategy=fedld", "client=margin"])) == []
    assert notes(compose(["strategy=fedavg", "client=margin"])) == []


def test_yaml_is_in_composed_order_without_hydra() -> None:
    text = to_yaml(compose(["strategy=fedld"]))
    tree = yaml.safe_load(text)
    assert "hydra" not in tree
    assert next(iter(tree)) == "num_rounds"
    assert [name for name in tree if name in catalogue.defaults()] == list(catalogue.defaults())
    assert text.startswith("# data=digits partition=dirichlet")
    assert "${" not in text


def test_no_global_hydra_is_left_behind() -> None:
    from hydra.core.global_hydra import GlobalHydra

    compose([])
    with pytest.raises(UserError):
        compose(["strategy.rnk=1"])
    assert not GlobalHydra.instance().is_initialized()


# ---- further folders of choices


def folder_with(tmp_path: Path, files: dict[str, str]) -> Path:
    folder = tmp_path / "it's a folder, é = 1"  # whatever a path may hold
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_config_dir_adds_choices_groups_and_suggestions(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        {
            "strategy/zebra": "defaults: [override /client@_global_.client: margin, _self_]\n_target_: a.B\n",
            "experiment/small": "# @package _global_\nnum_rounds: 3\n",
        },
    )
    config = compose(["strategy=zebra", "+experiment=small"], config_dir=folder)
    assert (config.strategy._target_, config.num_rounds) == ("a.B", 3)
    assert config.client._target_ == "fedsim.clients.margin.Margin"
    assert len(notes(compose(["strategy=zebra", "client=sgd"], config_dir=folder))) == 1
    with pytest.raises(UserError, match="did you mean 'zebra'"):
        compose(["strategy=zebar"], config_dir=folder)
    with pytest.raises(UserError, match=r"write \+experiment=small"):
        compose(["experiment=small"], config_dir=folder)
    with pytest.raises(UserError, match="no experiment 'smal'"):
        compose(["+experiment=smal"], config_dir=folder)


def test_a_choice_that_fedsims_own_would_hide_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"strategy/fedavg": "# Mine.\n_target_: a.B\n"})
    with pytest.raises(UserError, match="strategy=fedavg is fedsim's own; rename"):
        compose([], config_dir=folder)
    compose(["strategy=fedld"], config_dir=folder)


@pytest.mark.parametrize("text", ["a: [1\n", "a: ${nix}\n", "defaults: [nix]\na: 1\n", "- 1\n"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    folder = folder_with(tmp_path, {"strategy/broken": text})
    with pytest.raises(UserError) as caught:
        compose(["strategy=broken"], config_dir=folder)
    assert re.match(r"strategy(=broken)?: |strategy .*broken\.yaml", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_config_dir_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        compose([], config_dir=tmp_path / "nix")


# ---- building


def test_parts_receive_plain_values() -> None:
    node = from_tree({"part": {"_target_": "builtins.dict", "a": [1, {"b": 2}], "c": {"d": [3]}}})
    built = instantiate(node.part)
    assert built == {"a": [1, {"b": 2}], "c": {"d": [3]}}
    assert type(built["a"]) is list
    assert type(built["a"][1]) is dict
    assert plain(3) == 3


def test_errors_know_where_the_node_stands() -> None:
    config = compose(["strategy._target_=no.such.Class"])
    with pytest.raises(UserError, match=r"strategy\._target_=no\.such\.Class does not exist: no module named 'no'"):
        instantiate(config.strategy)


@pytest.mark.parametrize("group", ["attack", "devices", "tracker"])
def test_none_builds_nothing(group: str) -> None:
    assert instantiate(compose([])[group]) is None


# ---- on disk


def test_run_dir_is_the_users_or_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["hydra.run.dir=a/b"])
    assert claim_run_dir(config) == claim_run_dir(config) == Path("a/b")
    assert Path("a/b").is_dir()

    config, other = compose(["strategy=flower/fedavg"]), compose(["strategy=flower/fedavg"])
    other.hydra.run.dir = config.hydra.run.dir  # begun in the same second
    first, second = claim_run_dir(config), claim_run_dir(other)
    assert first.parent.parent == Path("outputs")
    assert first.name.endswith("-flower-fedavg")
    assert second.name == f"{first.name}-2"
    assert other.hydra.run.dir == str(second)


@pytest.mark.parametrize("path", ["taken", "taken/below"])
def test_run_dir_that_cannot_be(tmp_path: Path, path: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"hydra\.run\.dir=.*taken"):
        claim_run_dir(compose([f"hydra.run.dir={tmp_path}/{path}"]))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    config = compose(["strategy=fedld", "partition.alpha=0.1", f"hydra.run.dir={tmp_path}"])
    config.partition.seed = 5  # what a builder resolved is in no override
    (tmp_path / "config.yaml").write_text(to_yaml(config, provenance=True), encoding="utf-8")
    return tmp_path


def test_a_saved_config_comes_back(run_folder: Path) -> None:
    saved = load(run_folder)
    assert (saved.partition.alpha, saved.partition.seed, saved.hydra.run.dir) == (0.1, 5, str(run_folder))
    assert amend(saved, []) == saved
    moved = run_folder.with_name("moved")
    run_folder.rename(moved)
    assert load(moved).hydra.run.dir == str(moved)


def test_resume_takes_what_may_change(run_folder: Path) -> None:
    amended = amend(load(run_folder), ["num_rounds=200", "partition.alpha=0.1", "strategy=fedld", "seed=0"])
    assert (amended.num_rounds, amended.partition.seed) == (200, 5)
    assert plain(amended) | {"num_rounds": 100} == plain(load(run_folder))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["partition.alpha=0.5"], ["differs: partition.alpha=0.1, asked 0.5"]),
        (["seed=1", "num_rounds=200"], ["differs: seed=0, asked 1"]),
        (["strategy=fedavg"], ["strategy=fedld, asked fedavg", "client=margin, asked sgd"]),
        (["hydra.run.dir=elsewhere"], ["hydra.run.dir"]),
        (["num_rounds=x"], ["num_rounds must be an integer"]),
        (["num_round=200"], ["did you mean 'num_rounds'"]),
    ],
    ids=lambda value: value[0],
)
def test_resume_refuses_what_may_not(run_folder: Path, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        amend(load(run_folder), overrides)
    assert all(part in str(caught.value) for part in parts)
    assert "num_rounds=" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", [None, "a: [1", "3", "", "seed: 1\n", "hydra: 3\n", "\x00"])
def test_a_folder_without_a_runs_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
