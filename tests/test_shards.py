"""Clients' state: in memory or in a file, and in checkpoints as shards that checkpoints share."""

import itertools
import os

import numpy as np
import pytest
import torch

import fedsim
from fedsim import checkpoint, shards, simulation
from fedsim.console import Observer
from fedsim.engine.store import ClientStore
from fedsim.errors import UserError
from fedsim.settings import Run
from fedsim.shards import Shards, shard_bytes

CPU = torch.device("cpu")
FIRST = {
    "control": torch.zeros(3, 2),
    "visits": torch.tensor(7),
    "half": torch.full((5,), 0.5, dtype=torch.bfloat16),
    "flag": torch.tensor([True]),
    "none": torch.zeros(0),
}
RECORD = 3 * 2 * 4 + 8 + 5 * 2 + 1


def values(clients, salt=0):
    """Return a state that tells every client from every other."""
    n = torch.from_numpy(np.asarray(clients))
    return {
        "control": n.float()[:, None, None] + salt + torch.arange(6.0).view(3, 2) / 8,
        "visits": n * 3 + salt,
        "half": (n.float()[:, None] + torch.arange(5.0)).to(torch.bfloat16),
        "flag": (n % 2 == 0)[:, None],
        "none": torch.zeros(len(n), 0),
    }


def same(a, b):
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


# --- the store ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_store_gives_what_it_was_given(memory, tmp_path):
    store = ClientStore(100, FIRST, memory=memory)
    store.folder = tmp_path
    assert store.record == RECORD
    assert store.paged == (memory == 0) == (not store.arrays)
    someone, other = np.array([3, 99, 40]), np.array([3, 5])
    store.put(someone, values(someone))
    assert same(store.get(someone, CPU), values(someone))
    fresh = store.get(other, CPU)
    assert torch.equal(fresh["control"][1], FIRST["control"])
    assert fresh["visits"].tolist() == [9, 7]  # never seen: the first value
    store.put(np.array([99]), {"visits": torch.tensor([1])})  # one name of several
    assert store.get(np.array([99]), CPU)["visits"].tolist() == [1]
    assert torch.equal(store.get(np.array([99]), CPU)["control"], values([99])["control"])
    touched, rows = store.rows()
    assert touched.tolist() == [3, 40, 99]
    assert torch.equal(rows["control"][:2], values([3, 40])["control"])
    assert np.flatnonzero(store.changed).tolist() == [3, 40, 99]
    store.get(other, CPU)["control"].fill_(torch.nan)  # what is handed out is nobody's
    assert same(store.get(np.array([3]), CPU), values([3]))
    store.clear()
    assert store.get(someone, CPU)["visits"].tolist() == [7, 7, 7]


def test_both_kinds_of_store_agree(tmp_path):
    rng = np.random.default_rng(0)
    held, paged = ClientStore(50, FIRST), ClientStore(50, FIRST, memory=0)
    paged.folder = tmp_path
    for salt in range(30):
        who = rng.choice(50, size=rng.integers(0, 9), replace=False)
        for store in (held, paged):
            store.put(who, values(who, salt))
        ask = rng.choice(50, size=12, replace=False)
        assert same(held.get(ask, CPU), paged.get(ask, CPU))
    assert same(held.rows()[1], paged.rows()[1])


def test_a_paged_store_costs_neither_memory_nor_disk_for_clients_unseen(tmp_path):
    store = ClientStore(100_000, {"control": torch.zeros(10_000)}, memory=1 << 30)  # 4 GB, were it all there
    store.folder = tmp_path
    store.put(np.array([0, 99_999]), {"control": torch.ones(2, 10_000)})
    assert store.paged
    status = os.fstat(store._file.fileno())
    assert status.st_size == 4_000_000_000
    assert status.st_blocks * 512 < 1 << 20
    assert list(tmp_path.iterdir()) == []  # no name: nothing is left of it after a kill


def test_a_bound_below_nothing_is_refused():
    with pytest.raises(ValueError, match=r"client_state_bytes must be >= 0.*got -1"):
        fedsim.simulate("client_state_bytes=-1", num_rounds=1)
    assert Run.__dataclass_fields__["client_state_bytes"]


# --- shards -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Shards of four clients."""
    monkeypatch.setattr(shards, "BYTES", 4 * RECORD)


def made(tmp_path, count=20):
    store = ClientStore(count, FIRST)
    return store, Shards(tmp_path / "clients", "kept", store)


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "clients").iterdir())


@pytest.mark.usefixtures("small")
def test_only_shards_that_changed_are_written_and_the_others_shared(tmp_path):
    store, mine = made(tmp_path)
    assert mine.write(1)["shard"].tolist() == []
    assert not (tmp_path / "clients").exists()
    who = np.array([0, 1, 5, 19])
    store.put(who, values(who))
    first = mine.write(2)
    assert first["shard"].tolist() == [0, 1, 4]
    names = [f"kept-{low:09d}-00000002.safetensors" for low in (0, 4, 16)]
    assert files(tmp_path) == names
    untouched = {name: (tmp_path / "clients" / name).stat().st_mtime_ns for name in names}
    store.put(np.array([6]), values([6], salt=1))
    second = mine.write(3)
    assert second["round"].tolist() == [2, 3, 2]
    assert files(tmp_path) == sorted([*names, "kept-000000004-00000003.safetensors"])
    assert {name: (tmp_path / "clients" / name).stat().st_mtime_ns for name in names} == untouched
    assert mine.write(4)["round"].tolist() == [2, 3, 2]  # nobody changed
    for state, expected in ((first, {5: 15, 6: 7}), (second, {5: 15, 6: 19})):  # visits; 7: never seen
        other, reader = made(tmp_path)
        reader.load(state)
        assert other.get(np.array(list(expected)), CPU)["visits"].tolist() == list(expected.values())
        assert same(other.get(who, CPU), values(who))
        assert not other.changed.any()


@pytest.mark.usefixtures("small")
def test_files_go_when_the_last_checkpoint_that_needs_them_goes(tmp_path):
    store, mine = made(tmp_path, 4)
    for round in (1, 2, 3, 4):
        store.put(np.array([0]), values([0], round))
        mine.write(round)
        mine.prune(max(1, round - 1))  # two are kept
        kept = [f"kept-000000000-{r:08d}.safetensors" for r in (round - 1, round) if r]
        assert files(tmp_path) == kept


@pytest.mark.usefixtures("small")
def test_who_goes_back_finds_what_others_left(tmp_path):
    """Rounds 1, 2, 3 are written; a reader goes back to 2 and writes 3 again: it is kept, and 1 goes with its time."""
    store, mine = made(tmp_path, 8)
    states = {}
    for round in (1, 2, 3):
        store.put(np.array([0]), values([0], round))
        states[round] = mine.write(round)
    store.put(np.array([7]), values([7]))
    mine.write(3)  # a shard that the reader does not come to write
    other, reader = made(tmp_path, 8)
    reader.load(states[2])
    assert other.get(np.array([0]), CPU)["visits"].tolist() == [2]
    reader.prune(1)
    assert len(files(tmp_path)) == 4
    reader.prune(2)
    assert len(files(tmp_path)) == 3
    other.put(np.array([0]), values([0], 3))
    again = reader.write(3)
    reader.prune(3)
    assert files(tmp_path) == ["kept-000000000-00000003.safetensors"]
    third, last = made(tmp_path, 8)
    last.load(again)
    assert same(third.get(np.array([0]), CPU), values([0], 3))


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # a number, in a file that is read without complaint
    path.write_bytes(content)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tear", [shorten, flip, os.unlink])
def test_a_torn_shard_costs_its_checkpoint_only(tear, tmp_path):
    store, mine = made(tmp_path)
    for round in (1, 2):
        store.put(np.array([0, 9]), values([0, 9], round))
        checkpoint.save(tmp_path, round, {"clients": mine.write(round)})
    tear(tmp_path / "clients" / "kept-000000008-00000002.safetensors")
    other, reader = made(tmp_path)
    round, _ = checkpoint.load(tmp_path, lambda state: reader.load(state["clients"]))
    assert round == 1
    assert same(other.get(np.array([0, 9]), CPU), values([0, 9], 1))
    tear(tmp_path / "clients" / "kept-000000000-00000001.safetensors")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* \(round 2: .*kept-000000008.*; round 1: .*kept-000000000"
    ):
        checkpoint.load(tmp_path, lambda state: reader.load(state["clients"]))


@pytest.mark.usefixtures("small")
def test_other_shard_sizes_are_read_too(tmp_path, monkeypatch):
    store, mine = made(tmp_path)
    who = np.arange(20)
    store.put(who, values(who))
    state = mine.write(1)
    monkeypatch.setattr(shards, "BYTES", 7 * RECORD)
    other, reader = made(tmp_path)
    reader.load(state)
    assert same(other.get(who, CPU), values(who))
    other.put(np.array([19]), values([19], 1))
    assert reader.write(2)["round"].tolist() == [1, 1, 1, 1, 2]


def test_the_bytes_that_a_checkpoint_writes_are_bounded():
    store = ClientStore(1000, {"w": torch.zeros(1000)})
    assert shard_bytes(store, 3) == 3 * shards.BYTES
    assert shard_bytes(store, 900) == 4_000_000  # all clients
    assert shard_bytes(ClientStore(10, {}), 5) == 0


# --- runs ---------------------------------------------------------------------------------------------------------

STATEFUL = (
    "data=blobs", "data.num_samples=120", "partition=iid", "partition.num_clients=12", "model=logreg", "fraction=0.25",
    "threads=1", "client.lr=0.1", "checkpoint.every=1", "metrics.every=2",
)  # fmt: skip
BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    count = itertools.count()

    def go(*overrides, **settings):
        return fedsim.simulate(*STATEFUL, *overrides, folder=tmp_path / f"run-{next(count)}", **settings)

    return go


def contents(result):
    return {name: (result.folder / name).read_bytes() for name in BYTES}


METHODS = ["strategy=scaffold", "strategy=ef21", "model.local=bias"]


@pytest.mark.parametrize("method", METHODS)
def test_state_in_a_file_is_state_in_memory(run, monkeypatch, method):
    """To the byte, over a resumption that takes the other kind of store, and whatever the shards' size."""
    whole = run(method, num_rounds=6)
    assert contents(run(method, "client_state_bytes=0", num_rounds=6)) == contents(whole)
    monkeypatch.setattr(shards, "BYTES", 1)
    short = run(method, "client_state_bytes=0", num_rounds=4)
    assert any((short.folder / "checkpoints" / "clients").iterdir())
    resumed = simulation.resume(short.folder, ["num_rounds=6", "client_state_bytes=1000000"], Observer())
    assert contents(resumed) == contents(whole)


def test_a_torn_shard_costs_a_run_its_last_round_only(run, monkeypatch):
    monkeypatch.setattr(shards, "BYTES", 1)
    whole, torn = run("strategy=scaffold", num_rounds=6), run("strategy=scaffold", num_rounds=6)
    newest = max((torn.folder / "checkpoints" / "clients").glob("*-00000006.safetensors"))
    flip(newest)
    rounds = []

    class Counting(Observer):
        def round(self, row):
            rounds.append(row["round"])

    assert contents(simulation.resume(torn.folder, [], Counting())) == contents(whole)
    assert rounds == [6]


def test_the_folder_of_shards_holds_two_checkpoints_and_no_more(run, monkeypatch):
    monkeypatch.setattr(shards, "BYTES", 1)
    result = run("strategy=scaffold", num_rounds=20)
    _, state = checkpoint.load(result.folder / "checkpoints")
    used = len(state["clients"]["clients"]["shard"])
    names = list((result.folder / "checkpoints" / "clients").iterdir())
    assert used == 12  # each client has trained
    assert used <= len(names) <= used + 3  # the last cohort's of the older one
