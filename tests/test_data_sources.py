"""Laws that every data source keeps, and the hand cases of the small ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedsim.data.blobs import blobs
from fedsim.data.check import check_dataset
from fedsim.data.digits import digits
from fedsim.data.holdout import stratified_holdout
from fedsim.data.npz import npz
from fedsim.data.synthetic import synthetic
from fedsim.errors import UserError

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (REPOSITORY / "configs" / "data").glob("*.yaml") if not path.stem.startswith("_"))
REAL_DATA = Path(os.environ.get("FEDSIM_DATA") or REPOSITORY.parent / "shared" / "data")

# What a source that reads files is given here; the others run as they are.
FILES = {
    "csv": {"path": "table.csv", "label": "class", "client": "site"},
    "npz": {"path": "arrays.npz"},
    "text": {"path": "play.txt", "window": 5, "stride": 2, "min_samples": 3},
}
ON_DISK = {"heart_disease": "heart_disease", "shakespeare": "shakespeare", "mnist": "mnist", "cifar10": "cifar10"}
NOT_HERE = {"hf", "fashion_mnist", "cifar100", "femnist"}  # need the hub; tests/test_data_hf.py has their code path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    rows = "".join(f"{site},{i % 3},{i * 0.5},{'red' if i % 2 else 'blue'}\n" for i in range(20) for site in "ab")
    (tmp_path / "table.csv").write_text("site,class,length,colour\n" + rows)
    (tmp_path / "play.txt").write_text("\n\n".join(f"{name}:\n{'abc def ' * 9}" for name in ("ANN", "BOB", "ANN")))
    write_npz(tmp_path / "arrays.npz")
    return tmp_path


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.normal(size=(12, 4)),
        "y_train": np.arange(12) % 3,
        "x_test": rng.normal(size=(6, 4)),
        "y_test": np.arange(6) % 3,
        "client_train": np.array(list("bbbbaaaaccca")),
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def build(name, folder):
    config = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "configs" / "data" / f"{name}.yaml"))
    del config["defaults"]
    if name in ON_DISK:
        if not (REAL_DATA / ON_DISK[name]).is_dir():
            pytest.skip(f"{ON_DISK[name]} is not in {REAL_DATA}; set FEDSIM_DATA")
        config["root"] = str(REAL_DATA)
    elif name in FILES:
        config |= {"root": str(folder)} | FILES[name]
    return instantiate(config, _convert_="all")


@pytest.mark.parametrize(
    "name",
    # The two image sets take seconds to decode: test_data_hf.py has them.
    [path.stem for path in CONFIGS if path.stem not in {*NOT_HERE, "mnist", "cifar10"}],
)
def test_a_source_keeps_the_contract_and_repeats_itself(name, folder):
    one, two = build(name, folder), build(name, folder)
    assert check_dataset(one) is one
    train, test = one.splits["train"], one.splits["test"]
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(one.x) == len(one.y)
    assert set(one.y[train].tolist()) <= set(range(one.num_classes))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.y, two.y)
    assert all(np.array_equal(one.splits[split], two.splits[split]) for split in one.splits)
    for field in ("client", "domain"):
        np.testing.assert_equal(getattr(one, field), getattr(two, field))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_it_is_and_every_argument_of_its_target(path):
    import importlib
    import inspect

    first, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    assert first.endswith(".")
    assert len(first) <= 120
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert config.pop("defaults") == ["_shared", "_self_"]
    module, _, function = config.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    assert set(config) == set(parameters)
    if path.stem in {"csv", "npz", "text", "digits", "blobs", "synthetic", "hf"}:  # not presets: the defaults agree
        for key, value in config.items():
            default = parameters[key].default
            assert value == (list(default) if isinstance(default, tuple) else default or value), key


# ---- train/test splits


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_a_holdout_is_in_proportion_within_every_stratum(fraction):
    rng = np.random.default_rng(0)
    client, label = rng.integers(7, size=400), rng.integers(5, size=400)
    splits = stratified_holdout(client, label, fraction=fraction, seed=3)
    assert np.array_equal(np.sort(np.concatenate([splits["train"], splits["test"]])), np.arange(400))
    assert len(splits["test"]) == np.floor(fraction * 400 + 0.5)
    for k in range(7):
        for mask in [client == k, *((client == k) & (label == c) for c in range(5))]:
            held = mask[splits["test"]].sum()
            assert abs(held - fraction * mask.sum()) < 1, (k, held, mask.sum())


def test_a_holdout_is_a_function_of_its_seed_and_leaves_no_client_without_training_data():
    client = np.repeat(np.arange(50), 2)
    one, same, other = (stratified_holdout(client, fraction=0.9, seed=seed)["test"] for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    train = stratified_holdout(client, fraction=0.9, seed=0)["train"]
    assert set(client[train]) == set(range(50))


def test_a_holdout_picks_at_random_within_a_stratum():
    # 400 seeds of 3 out of 10: each sample is held out 120 ± 9.2 (binomial) times; 5 standard deviations.
    picks = np.concatenate([stratified_holdout(np.zeros(10), fraction=0.3, seed=s)["test"] for s in range(400)])
    counts = np.bincount(picks, minlength=10)
    assert counts.sum() == 1200
    assert abs(counts - 120).max() < 46


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"test_fraction must be a fraction with 0 < test_fraction < 1, got"):
        digits(test_fraction=fraction)


# ---- digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data, expected = digits(), load_digits()
    np.testing.assert_array_equal(data.x[:, 0].numpy(), expected.images.astype(np.float32) / 16)
    np.testing.assert_array_equal(data.y.numpy(), expected.target)
    held = np.bincount(data.y[data.splits["test"]].numpy())
    assert len(data.splits["test"]) == 359
    assert (abs(held - 0.2 * np.bincount(expected.target)) < 1).all()


def test_digits_do_not_import_scikit_learn():
    code = "import sys; from fedsim.data.digits import digits; digits(); sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


# ---- npz


def test_npz_holds_the_arrays_it_was_given(tmp_path):
    data = npz(path=str(write_npz(tmp_path / "a.npz")))
    with np.load(tmp_path / "a.npz") as given:
        np.testing.assert_array_equal(data.x[:12].numpy(), given["x_train"].astype(np.float32))
        np.testing.assert_array_equal(data.x[data.splits["test"]].numpy(), given["x_test"].astype(np.float32))
        np.testing.assert_array_equal(data.y.numpy(), np.concatenate([given["y_train"], given["y_test"]]))
    assert data.num_classes == 3
    assert data.client_names == ("a", "b", "c")
    assert data.client.tolist() == [1] * 4 + [0] * 4 + [2] * 3 + [0] + [-1] * 6


def test_npz_scales_pixels_and_keeps_tokens(tmp_path):
    pixels = np.array([[0, 51, 255]] * 12, dtype=np.uint8)
    data = npz(path=str(write_npz(tmp_path / "a.npz", x_train=pixels, x_test=pixels[:6])))
    torch.testing.assert_close(data.x[0], torch.tensor([0, 0.2, 1]))
    tokens = pixels.astype(np.int16)
    data = npz(path=str(write_npz(tmp_path / "b.npz", x_train=tokens, x_test=tokens[:6])))
    assert data.x.dtype == torch.int64
    assert data.x[0].tolist() == [0, 51, 255]


NAN = np.tile([0, np.nan, 0, 0], (12, 1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x_test": None}, "has no array 'x_test'"),
        ({"y_train": np.zeros(11, int)}, r"x_train must be \(N, …\) and y_train \(N,\), got \(12, 4\) and \(11,\)"),
        ({"y_train": np.zeros((12, 1), int)}, r"y_train \(N,\)"),
        ({"y_train": np.zeros(12)}, "y_train must be integers"),
        ({"x_test": np.zeros((6, 5))}, "differ in one sample"),
        ({"x_train": np.zeros(12)}, r"x_train must be \(N, …\)"),
        ({"client_train": np.zeros(5, int)}, r"client_train must be \(12,\)"),
        ({"y_train": np.array([object()] * 12)}, "without pickled objects"),
        ({"y_train": np.arange(12) % 3 - 1}, r"labels must be in 0 … 2, got -1 … 2 \(first at sample 0\)"),
        ({"x_train": NAN}, "sample 0 holds NaN or infinity"),
        ({"x_train": np.full((12, 4), 1e300)}, "sample 0 holds NaN or infinity"),
        ({"x_train": np.zeros((12, 0)), "x_test": np.zeros((6, 0))}, "samples are empty"),
        ({"x_test": np.zeros((0, 4)), "y_test": np.zeros(0, int)}, "the split 'test' is empty"),
    ],
)
def test_npz_that_is_wrong_is_one_clear_error(changes, match, tmp_path):
    path = write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError, match=match), np.errstate(over="ignore"):
        check_dataset(npz(path=str(path)))


def test_npz_labels_beyond_the_stated_classes_are_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"labels must be in 0 … 1, got 0 … 2 \(first at sample 2\)"):
        check_dataset(npz(path=str(path), num_classes=2))


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_text("text")
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        npz(path="a.npz", root=str(tmp_path))


# ---- where files are looked for


def test_files_are_looked_for_here_then_in_the_environments_folder_then_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("data", "shelf"):
        (tmp_path / place).mkdir()
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "shelf"))
    with pytest.raises(UserError) as error:
        npz(path="a.npz")
    for place in (tmp_path, tmp_path / "shelf", tmp_path / "data"):
        assert f"{place / 'a.npz'}" in str(error.value)
    for place, classes in (("data", 3), ("shelf", 4), (".", 5)):  # each goes before the ones above it
        write_npz(tmp_path / place / "a.npz", y_train=np.arange(12) % classes)
        assert npz(path="a.npz").num_classes == classes
    assert npz(path="a.npz", root="data").num_classes == 3
    with pytest.raises(UserError, match=r"no file 'a\.npz'; looked at \S+nowhere/a\.npz\. Set data\.path, data\.root"):
        npz(path="a.npz", root="nowhere")
    with pytest.raises(UserError, match=r"data\.path is needed"):
        npz()


# ---- synthetic and blobs


def test_synthetic_sizes_and_spread_are_the_papers():
    data = synthetic(num_clients=400, alpha=0.5, beta=2.0)
    sizes = np.bincount(data.client)
    assert sizes.min() >= 50
    # log(n − 50) of ⌊log-normal(4, 2)⌋ + 50: median 4 ± 1.25 · 2/√400 = .125 (standard error); 4 of them.
    low, middle, high = np.quantile(np.log(sizes - 49.5), [0.25, 0.5, 0.75])
    assert abs(middle - 4) < 0.5
    # The quartiles of N(4, 2²) are 1.349 · 2 apart; standard error 1.57 · 2/√400 = .16.
    assert abs((high - low) / 1.349 - 2) < 0.5
    assert data.x.shape[1:] == (60,)
    assert data.num_classes == 10
    # Client means are B_k + N(0, 1) + noise of a sample mean: over features, the mean of v_k is N(B_k, 1/60).
    means = np.array([data.x[data.client == k].double().mean(0).numpy() for k in range(400)])  # (K, F)
    assert abs(means.mean(1).std() - np.sqrt(2.0**2 + 1 / 60)) < 4 * 2 / np.sqrt(2 * 400)
    assert abs((means - means.mean(1, keepdims=True)).std() - 1) < 0.05
    # Inside a client the j-th feature has variance j^−1.2.
    largest = data.x[data.client == sizes.argmax()].double()
    expected = torch.arange(1, 61, dtype=torch.float64) ** -1.2
    torch.testing.assert_close(largest.var(0), expected, rtol=0.2, atol=0)


def test_synthetic_labels_are_the_argmax_of_a_linear_model_per_client():
    data = synthetic(num_clients=3, min_size=400)
    for k in range(3):
        # The labels of more samples than 2 · 61 are linearly separable by chance with probability ~0 (Cover 1965).
        x, y = data.x[data.client == k][:400].double(), data.y[data.client == k][:400]
        weight = torch.zeros(61, 10, dtype=torch.float64, requires_grad=True)
        design = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1)], 1)
        optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

        def loss(design=design, weight=weight, y=y, optimizer=optimizer):
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(design @ weight, y)
            value.backward()
            return value

        optimizer.step(loss)
        assert ((design @ weight).argmax(1) == y).all()


def test_synthetic_iid_has_one_model_and_one_input_distribution():
    mixed, alike = synthetic(num_clients=60), synthetic(num_clients=60, iid=True)

    def spread(data):  # of the clients' mean inputs
        return np.std([data.x[data.client == k].mean().item() for k in range(60)])

    def label_skew(data):  # mean total variation between a client's labels and all labels
        pool = torch.bincount(data.y, minlength=10) / len(data.y)
        own = [torch.bincount(data.y[data.client == k], minlength=10) for k in range(60)]
        return np.mean([(0.5 * (counts / counts.sum() - pool).abs().sum()).item() for counts in own])

    assert spread(alike) < 0.05 < 0.5 < spread(mixed)
    # One law for all: what is left is sampling, at most about √(C / 2πn) = .18 at 50 samples.
    assert label_skew(alike) < 0.18 < 0.5 < label_skew(mixed)


def test_more_synthetic_clients_leave_the_first_ones_as_they_were():
    few, many = synthetic(num_clients=3), synthetic(num_clients=5)
    assert torch.equal(few.x, many.x[: len(few.x)])
    assert torch.equal(few.y, many.y[: len(few.y)])


@pytest.mark.parametrize("changes", [{"alpha": -1}, {"num_clients": 0}, {"num_classes": 1}, {"min_size": 1}])
def test_synthetic_checks_its_arguments(changes):
    (name, value) = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name} must be ≥ . *, got {value}".replace(" *", "")):
        synthetic(**changes)


def test_blobs_are_as_far_apart_as_asked():
    data = blobs(num_samples=4000, shape=[2, 3], num_classes=4, num_domains=2, spread=10, domain_shift=0)
    assert data.x.shape == (4000, 2, 3)
    assert torch.bincount(data.y).tolist() == [1000] * 4
    centres = torch.stack([data.x[data.y == c].mean(0) for c in range(4)])
    residual = data.x - centres[data.y]
    assert abs(residual.std() - 1) < 0.02  # 24000 values: 1 ± .0046
    shifted = blobs(num_samples=4000, shape=[2, 3], num_classes=4, num_domains=2, spread=10, domain_shift=50)
    assert (shifted.x[shifted.domain == 0].mean(0) - shifted.x[shifted.domain == 1].mean(0)).abs().max() > 10
    own = blobs(num_clients=6, num_domains=3)
    assert np.array_equal(own.domain, own.client % 3)


# ---- check_dataset


def broken(**changes):
    return blobs(num_samples=20, num_clients=4)._replace(**changes)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("no data set", "must return a fedsim.contracts.Dataset, got str"),
        (broken(x=torch.zeros(20, 2, dtype=torch.uint8)), "x must be .* float32"),
        (broken(y=torch.zeros(20)), r"y must be a torch tensor \(N,\) int64"),
        (broken(y=torch.zeros(19, dtype=torch.int64)), "x has 20, y 19"),
        (broken(client=np.zeros(3, np.int64)), "x has 20, client 3"),
        (broken(client=np.full(20, -2)), "client must be −1"),
        (broken(client_names=("a",)), r"client must be −1 \(none\) or 0 … 0"),
        (broken(class_names=("a", "b")), "5 classes but 2 class_names"),
        (broken(num_classes=1), "at least 2 classes"),
        (broken(splits={"train": np.arange(20)}), "the split 'test' is missing"),
        (broken(splits={"train": np.arange(15), "test": np.arange(14, 20)}), "'train' and 'test' share sample 14"),
        (broken(splits={"train": np.arange(15), "test": np.array([16, 16])}), "'test' holds a sample twice"),
        (broken(splits={"train": np.arange(15), "test": np.array([20])}), "'test' has a position outside 0 … 19"),
        (broken(splits={"train": np.arange(15.0), "test": np.array([16])}), "int64 positions"),
        (broken(splits={"train": [0.5, 1], "test": [16]}), "'train' must be .* int64 positions, got a list of others"),
        (broken(splits={"train": [[0], [1, 2]], "test": [16]}), "'train' must be .* int64 positions"),
        (broken(x=torch.full((20, 2), torch.inf)), "sample 0 holds NaN"),
        (broken(x=torch.full((20, 2), -1)), "tokens must be ≥ 0, got -1"),
    ],
)
def test_a_data_set_that_breaks_the_contract_is_named(dataset, match):
    with pytest.raises(UserError, match=match):
        check_dataset(dataset)


@pytest.mark.parametrize("test", [range(15, 20), [15, 16], (15,), torch.arange(15, 18)])
def test_splits_may_be_any_sequence_of_integers(test):
    splits = check_dataset(broken(splits={"train": range(15), "test": test})).splits
    assert all(positions.dtype == np.int64 for positions in splits.values())
    assert splits["train"].tolist() == list(range(15))
    assert splits["test"].tolist() == [int(i) for i in test]
    with pytest.raises(UserError, match="the split 'test' is empty"):
        check_dataset(broken(splits={"train": range(15), "test": []}))
