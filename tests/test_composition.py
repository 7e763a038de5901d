"""A composition that is kept is the one that Hydra would make: for any choice and value, after any other."""

from itertools import count

import pytest
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from fedsim import catalogue, composition
from fedsim.config import _compose, _trimmed, compose, parse, to_yaml
from fedsim.errors import UserError

NAMES = {group: list(catalogue.options(group, catalogue.roots())) for group in catalogue.groups(catalogue.roots())}


def composed(words):
    return _compose([parse(word) for word in words], NAMES, None)


def assert_same(kept, whole):
    for config in (kept, whole):
        OmegaConf.resolve(config)
        if "hydra.run.dir" not in str(config.hydra.overrides.task):
            config.hydra.run.dir = "a second may have passed"
    assert list(kept) == list(whole)
    assert OmegaConf.to_container(kept) == OmegaConf.to_container(whole)
    assert OmegaConf.is_struct(kept) == OmegaConf.is_struct(whole)
    assert OmegaConf.is_struct(kept.client) == OmegaConf.is_struct(whole.client)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["seed=3", "client.lr=0.5", "partition.alpha=10"],
        ["strategy=fedld", "client.margin_lambda=0.2"],
        ["client=sgd", "strategy=fedld"],
        ["strategy=fedadam", "+strategy@strategy.rule=median"],
        ["strategy=flower/krum", "seed=1"],
        ["hydra.run.dir=here/${strategy._target_}", "seed=1"],
        ["hydra.run.dir=there"],
        ["model.hidden=[3,4]", "threads=2", "device=null", "model.seed=7"],
        ["partition={alpha:0.25}", "model.init='a b=c'"],
        ["partition.seed=${seed}", "seed=5"],
        ["+client.extra=1"],
        ["~client.lr"],
    ],
)
def test_a_kept_composition_is_hydras(words):
    composed(["seed=9", "client.lr=0.25"])  # something else before
    whole = _trimmed(composition.fresh(words, None), list(words), None)
    for _ in range(2):  # when it is made, and when it is kept
        assert_same(composed(words), whole)


def test_what_hydras_launchers_and_loggers_are_told_is_not_composed():
    choices = composition.fresh(["strategy=fedld"], None).hydra.runtime.choices
    assert {name for name, choice in choices.items() if name.startswith("hydra/") and choice} == set()
    assert choices.strategy == "fedld"


def test_what_a_caller_does_to_his_copy_is_his_own_matter():
    first = compose(["strategy=fedavg"])
    first.client.lr = 77.0
    first.hydra.runtime.choices.strategy = "other"
    assert compose(["strategy=fedavg"]).client.lr != 77.0
    assert compose(["strategy=fedavg"]).hydra.runtime.choices.strategy == "fedavg"


@pytest.fixture
def ticking():
    """A clock that goes on whenever it is read."""
    compose(["seed=40"])  # a composition that is made sets Hydra's clock
    times = count()
    OmegaConf.register_new_resolver("now", lambda pattern: str(next(times)), use_cache=True, replace=True)
    yield
    setup_globals()  # Hydra's own clock


@pytest.mark.usefixtures("ticking")
def test_the_time_of_day_is_read_at_each_composition():
    assert compose(["seed=41"]).hydra.run.dir != compose(["seed=42"]).hydra.run.dir


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "strategy" / "mine.yaml"
    path.parent.mkdir()
    head = "# Mine.\n_target_: fedsim.strategies.fedavg.FedAvg\nserver_momentum: "
    path.write_text(head + "0.5\n")
    assert compose(["strategy=mine"], config_dir=tmp_path).strategy.server_momentum == 0.5
    path.write_text(head + "0.25\n")
    assert compose(["strategy=mine"], config_dir=tmp_path).strategy.server_momentum == 0.25
    path.unlink()
    with pytest.raises(UserError, match="no strategy 'mine'"):
        compose(["strategy=mine"], config_dir=tmp_path)


def test_a_bounded_number_is_kept(monkeypatch):
    monkeypatch.setattr(composition, "_MOST", 2)
    monkeypatch.setattr(composition, "_kept", {})
    for name in ("fedavg", "fedld", "krum", "median"):
        assert compose([f"strategy={name}"]).hydra.runtime.choices.strategy == name
    assert len(composition._kept) == 2


def test_an_error_is_hydras_own():
    compose(["seed=1"])
    with pytest.raises(UserError, match=r"client=sgd has no setting 'lrr'; did you mean 'lr'\?"):
        compose(["client.lrr=1"])
    assert "lrr" not in to_yaml(compose(["seed=1"]))
