"""The user's own rows of the engine table decide what `engine=auto` takes, and nothing else does."""

import itertools
import json

import numpy as np
import pytest
import torch

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Partition
from fedsim.engine import measured
from fedsim.engine.auto import make_engine
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Task
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.mlp import mlp


def make_task(hidden=6, batch_size=4, dtype=torch.float32):
    module = mlp((8,), 3, hidden=(hidden,)).to(dtype)
    return Task(
        module=module,
        shared=Layout.of(dict(module.named_parameters())),
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=CrossEntropy(),
        training=LocalTraining(lr=0.1, batch_size=batch_size),
        x=torch.zeros(40, 8, dtype=dtype),
        y=torch.zeros(40, dtype=torch.int64),
        partition=Partition(np.arange(40), np.arange(9) * 5),
        store=ClientStore(8, {}),
    )


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "fedsim" / "engines.json"


def save(task, cohort, arguments, threads=1):
    return measured.save(
        measured.situation(task, cohort, threads), measured.Winner(arguments, "2026-01-31"), {"milliseconds": {}}
    )


def test_the_file_lies_in_the_users_config_folder(monkeypatch, place):
    assert measured.path() == place
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(measured.path()) == "/somewhere/.config/fedsim/engines.json"


def test_auto_takes_the_users_row_and_says_when_it_was_measured(place):
    before, why = make_engine(make_task(), "auto", cohort=6, threads=1)
    assert before.plan["engine"] == "vectorized"
    assert "measured" not in why
    save(make_task(), 6, {"name": "sequential"})
    engine, why = make_engine(make_task(), "auto", cohort=6, threads=1)
    assert engine.plan["engine"] == "sequential"
    assert why == "measured on 2026-01-31 by fedsim bench"


def test_arguments_of_the_row_reach_the_engine(place):
    save(make_task(), 6, {"name": "vectorized", "kernels": "generic", "chunk": 3})
    engine, _ = make_engine(make_task(), "auto", cohort=6, threads=1)
    assert (engine.plan["kernels"], engine.plan["chunk"]) == ("generic", 3)
    engine.close()


def test_a_row_whose_engine_cannot_run_the_task_gives_way_to_the_table(place):
    """The file outlives versions of fedsim, and a situation does not say all that an engine may refuse."""
    expected, _ = make_engine(make_task(), "auto", cohort=6, threads=1)
    save(make_task(), 6, {"name": "vectorized", "kernels": "fused", "chunk": 0})  # refused: chunk < 1
    engine, why = make_engine(make_task(), "auto", cohort=6, threads=1)
    assert engine.plan == expected.plan
    assert "not as measured on 2026-01-31 by fedsim bench: engine=vectorized" in why
    with pytest.raises(UserError, match="engine=vectorized"):  # who asks for it is told
        make_engine(make_task(), "vectorized", cohort=6, threads=1, kernels="fused", chunk=0)


@pytest.mark.parametrize(
    ("task", "cohort", "threads"),
    [
        (lambda: make_task(hidden=7), 6, 1),
        (lambda: make_task(batch_size=5), 6, 1),
        (lambda: make_task(dtype=torch.float64), 6, 1),
        (make_task, 9, 1),
        (make_task, 4, 1),
        (make_task, 6, 2),
    ],
    ids=["model", "batch", "dtype", "larger cohort", "smaller cohort", "threads"],
)
def test_a_row_holds_for_its_own_situation_only(place, task, cohort, threads):
    save(make_task(), 6, {"name": "sequential"})
    engine, _ = make_engine(task(), "auto", cohort=cohort, threads=threads)
    assert engine.plan["engine"] == "vectorized"
    engine.close()


def test_cohorts_are_told_apart_by_powers_of_two(place):
    keys = [measured.situation(make_task(), cohort, 1) for cohort in (1, 2, 3, 4, 5, 8, 9)]
    assert [a == b for a, b in itertools.pairwise(keys)] == [False, False, True, False, True, False]


def test_an_engine_that_is_asked_for_ignores_the_row(place):
    save(make_task(), 6, {"name": "sequential"})
    engine, why = make_engine(make_task(), "vectorized", cohort=6, threads=1)
    assert (engine.plan["engine"], why) == ("vectorized", "as asked")
    engine.close()


def test_a_second_row_keeps_the_first_and_a_newer_one_replaces_it(place):
    save(make_task(), 6, {"name": "sequential"})
    save(make_task(), 20, {"name": "vectorized"})
    save(make_task(), 6, {"name": "vectorized"})
    rows = json.loads(place.read_text())
    assert [row["engine"]["name"] for row in rows.values()] == ["vectorized", "vectorized"]


@pytest.mark.parametrize("text", ["{", "[]", '{"KEY": {"engine": {}}}', '{"KEY": 3}'])
def test_a_spoilt_file_is_one_clear_line(place, text):
    place.parent.mkdir()
    place.write_text(text.replace("KEY", measured.situation(make_task(), 6, 1)))
    with pytest.raises(UserError, match=r"engines\.json.*delete it") as caught:
        make_engine(make_task(), "auto", cohort=6, threads=1)
    assert "\n" not in str(caught.value)
