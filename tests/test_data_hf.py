"""The Hugging Face source on local files: parquet by pyarrow, other folders by `datasets`, errors, the cache."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from fedsim.data import images
from fedsim.data.augment import CropFlip
from fedsim.data.check import check_dataset
from fedsim.data.hf import hf
from fedsim.errors import UserError

Image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install 'fedsim[data]'")

REAL_DATA = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(num, shape=(4, 3), seed=0):
    return np.random.default_rng(seed).integers(256, size=(num, *shape), dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_split(folder, file, arrays, *, names=None, **columns):
    """Write a parquet file in the hub's image schema."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": [{"bytes": png(array), "path": None} for array in arrays],
        "label": [i % 3 for i in range(len(arrays))],
        **columns,
    }
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    parquet = pa.table(table).replace_schema_metadata({"huggingface": json.dumps(info)} if names else None)
    pyarrow.parquet.write_table(parquet, folder / file)


@pytest.fixture
def toys(place):
    """9 training and 6 test images, grey."""
    folder = place / "shelf" / "toys"
    write_split(folder, "train.parquet", pixels(9), names=["car", "doll", "kite"])
    write_split(folder, "test.parquet", pixels(6, seed=1), names=["car", "doll", "kite"])
    return folder


def load(**changes):
    return hf(**{"name": "someone/toys", "root": "shelf", "image": "image"} | changes)


def test_pixels_classes_and_splits_are_the_files(toys):
    data = check_dataset(load(mean=[0.0], std=[1.0]))
    expected = np.concatenate([pixels(9), pixels(6, seed=1)])[:, None] / np.float32(255)
    np.testing.assert_array_equal(data.x.numpy(), expected.astype(np.float32))
    assert data.y.tolist() == [0, 1, 2] * 5
    assert data.class_names == ("car", "doll", "kite")
    assert data.splits["train"].tolist() == list(range(9))
    assert data.splits["test"].tolist() == list(range(9, 15))


def test_normalisation_is_fitted_on_training_images_only(toys):
    data = load()
    np.testing.assert_allclose(data.x[:9].mean(), 0, atol=1e-6)  # float32 sums of 108 numbers
    np.testing.assert_allclose(data.x[:9].std(correction=0), 1, atol=1e-6)
    write_split(toys, "test.parquet", np.zeros((6, 4, 3), np.uint8), names=["car", "doll", "kite"])
    assert torch.equal(load().x[:9], data.x[:9])
    held = load(test_split=None, test_fraction=0.4)
    assert abs(held.x[held.splits["train"]].mean()) < 1e-6


def test_normalisation_is_the_formula(toys):
    data = load(mean=[0.25], std=[0.5])
    np.testing.assert_allclose(data.x[:9, 0], (pixels(9) / 255 - 0.25) / 0.5, rtol=1e-6, atol=1e-6)


def test_colours_come_channels_first(place):
    array = pixels(9, (4, 3, 3))
    for split in ("train", "test"):
        write_split(place / "shelf" / "toys", f"{split}.parquet", array)
    data = load(mean=[0.0, 0.1, 0.2], std=[1.0, 2.0, 4.0])
    expected = (array / 255 - [0.0, 0.1, 0.2]) / [1.0, 2.0, 4.0]
    np.testing.assert_allclose(data.x[:9], expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert data.class_names == ("0", "1", "2")


def test_one_split_is_cut_by_client_and_class(place):
    writers = [f"w{i % 4}" for i in range(40)]
    write_split(place / "shelf" / "toys", "train.parquet", pixels(40), writer=writers, place=["in", "out"] * 20)
    data = load(test_split=None, test_fraction=0.2, client="writer", domain="place", augment=CropFlip())
    assert data.client_names == ("w0", "w1", "w2", "w3")
    assert np.bincount(data.client[data.splits["test"]]).tolist() == [2] * 4
    assert data.domain.tolist() == [0, 1] * 20
    assert data.augment == CropFlip()


@pytest.mark.parametrize(
    "layout",
    [
        ["toys/{}.parquet"],
        ["someone/toys/data/{}-00000-of-00002.parquet", "someone/toys/data/{}-00001-of-00002.parquet"],
        ["toys/plain/{}/0000.parquet"],
    ],
)
def test_the_hubs_layouts_are_found(layout, place):
    for split, num in (("train", 12), ("test", 6)):
        parts = np.array_split(pixels(num), len(layout))
        for file, part in zip(layout, parts, strict=True):
            write_split(place / "shelf", file.format(split), part)
    write_split(place / "shelf", "toys/.cache/train.parquet", pixels(3))  # what a download tool leaves behind
    data = load(mean=[0.0], std=[1.0])
    np.testing.assert_allclose(data.x[:12, 0] * 255, pixels(12), rtol=1e-6)
    assert len(data.splits["test"]) == 6


def test_a_configuration_is_a_folder(place):
    for config, num in (("small", 9), ("large", 12)):
        for split in ("train", "test"):
            write_split(place / "shelf" / "toys", f"{config}/{split}-00000-of-00001.parquet", pixels(num))
    assert len(load(config="small").splits["train"]) == 9
    assert len(load(config="large").splits["train"]) == 12


def test_the_environments_folder_is_searched(toys, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", "shelf")
    assert len(load(root=None).x) == 15


def test_sizes_that_differ_are_refused_or_resized(toys):
    write_split(toys, "test.parquet", pixels(6, (5, 5)))
    with pytest.raises(UserError, match=r"training and test images differ in shape.*set data\.size"):
        load()
    assert load(size=[2, 3]).x.shape == (15, 1, 2, 3)
    write_split(toys, "test.parquet", [*pixels(2), *pixels(1, (5, 5))])
    with pytest.raises(UserError, match=r"image 2 is 5×5, the first is 4×3 \(height × width\); set data\.size"):
        load()


def test_columns_of_numbers_need_no_image(place):
    rows = {"z": [[1.0, 2.0], [3.0, 4.0]] * 3, "n": range(6), "kind": list("abcabc")}
    (place / "shelf" / "toys").mkdir(parents=True)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pa.table(rows), place / "shelf" / "toys" / f"{split}.parquet")
    data = check_dataset(load(image=None, features=["z", "n"], label="kind"))
    assert data.x[:3].tolist() == [[1, 2, 0], [3, 4, 1], [1, 2, 2]]
    assert data.y.tolist() == [0, 1, 2] * 4
    assert data.class_names == ("a", "b", "c")
    with pytest.raises(UserError, match="'kind' must hold numbers"):
        load(image=None, features=["kind"], label="n")
    with pytest.raises(UserError, match=r"data\.features: the data has no column 'm'"):
        load(image=None, features=["m", "n"], label="kind")


def test_decoding_is_cached_and_follows_the_files(toys, monkeypatch):
    first = load()
    calls = []
    monkeypatch.setattr("fedsim.data.hf.decode", lambda *a: calls.append(a) or images.decode(*a))
    assert torch.equal(load().x, first.x)
    assert not calls
    load(mean=[0.5], std=[0.5])  # normalisation is not part of what is cached
    assert not calls
    load(size=[2, 2])
    assert len(calls) == 2
    write_split(toys, "train.parquet", pixels(9, seed=7))
    assert not torch.equal(load().x[:9], first.x[:9])
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": None}, "data.name is needed"),
        ({"image": None}, "data.image or data.features is needed"),
        ({"features": ["label"]}, "data.image or data.features is needed, one of them"),
        ({"image": "imgae"}, "data.image: the data has no column 'imgae'; did you mean 'image'?"),
        ({"label": "labl"}, "data.label: the data has no column 'labl'; did you mean 'label'?"),
        ({"client": "writer"}, "data.client: the data has no column 'writer'"),
        ({"image": "label"}, "the image column must hold images"),
        ({"mean": [0.1, 0.2, 0.3]}, "mean and std must have 1 numbers"),
        ({"std": [0.0]}, "std must be > 0"),
        ({"size": [2]}, "size must be [height, width]"),
    ],
)
def test_wrong_arguments_are_named(arguments, match, toys):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        load(**arguments)
    assert match in str(error.value)


def test_damaged_files_and_images_are_named(toys):
    table = pyarrow.parquet.read_table(toys / "train.parquet")
    broken = table.set_column(0, "image", pa.array([{"bytes": b"no image", "path": None}] * 9))
    pyarrow.parquet.write_table(broken, toys / "train.parquet")
    with pytest.raises(UserError, match="image 0 cannot be decoded"):
        load()
    (toys / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        load()


def test_a_missing_extra_is_named(toys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim\[data\]'"):
        load()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim\[data\]'"):
        load(name="someone/else")


def test_other_folders_and_absent_names_go_through_datasets(place):
    """In a process of its own: `datasets` reads its settings when it is imported."""
    for split, num in (("train", 6), ("test", 4)):
        for i, array in enumerate(pixels(num, (4, 4))):
            path = place / "shelf" / "toys" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    code = """
from fedsim.data.hf import hf
from fedsim.data.check import check_dataset
for _ in range(2):
    data = check_dataset(hf(name="toys", root="shelf", image="image", mean=[0.0], std=[1.0]))
assert data.class_names == ("cat", "dog"), data.class_names
assert data.y.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1], data.y
import numpy as np
pixels = np.random.default_rng(0).integers(256, size=(6, 4, 4), dtype=np.uint8)
np.testing.assert_allclose(data.x[:6, 0] * 255, pixels[[0, 2, 4, 1, 3, 5]], rtol=1e-6)
try:
    hf(name="someone/absent", image="image")
except ValueError as error:
    assert type(error).__name__ == "UserError"
    message = str(error)
    assert "no split 'train' of 'someone/absent'" in message and "data/someone/absent" in message, message
    assert "set data.root" in message and "\\n" not in message, message
else:
    raise AssertionError
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mnist_is_the_published_one():
    if not (REAL_DATA / "mnist").is_dir():
        pytest.skip(f"mnist is not in {REAL_DATA}; set FEDSIM_DATA")
    data = check_dataset(hf(name="ylecun/mnist", root=str(REAL_DATA), image="image", mean=[0.1307], std=[0.3081]))
    assert data.x.shape == (70000, 1, 28, 28)
    # The published mean and deviation are those of the training images, to four digits.
    assert abs(data.x[:60000].double().mean()) < 5e-4
    assert abs(data.x[:60000].double().std() - 1) < 5e-4
    assert torch.bincount(data.y[:60000]).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.class_names == tuple("0123456789")


def test_cifar10_has_its_columns_names_and_moments():
    if not (REAL_DATA / "cifar10").is_dir():
        pytest.skip(f"cifar10 is not in {REAL_DATA}; set FEDSIM_DATA")
    # The test images alone: the training images take five times as long to decode.
    data = hf(name="uoft-cs/cifar10", root=str(REAL_DATA), image="img", train_split="test", test_split=None)
    assert check_dataset(data).x.shape == (10000, 3, 32, 32)
    assert torch.bincount(data.y).tolist() == [1000] * 10
    assert torch.bincount(data.y[data.splits["test"]]).tolist() == [200] * 10
    assert data.class_names[:2] == ("airplane", "automobile")
    train = data.x[data.splits["train"]]
    assert abs(train.mean((0, 2, 3))).max() < 1e-3
    assert abs(train.std((0, 2, 3)) - 1).max() < 1e-3
