"""The CSV source: hand cases of every kind of column, fits on training rows only, errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.data.check import check_dataset
from fedsim.data.csv import csv
from fedsim.errors import UserError

REAL_DATA = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")


def write(path, rows, header="site,dose,colour,grade,outcome"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


ROWS = [
    f"{'ab'[i % 2]},{i},{('red', 'green', 'blue')[i % 3]},{i % 2 + 1}{'.0' * (i % 4 > 1)},{i % 5}" for i in range(30)
]


def test_columns_become_features_in_order(tmp_path):
    data = check_dataset(
        csv(path=write(tmp_path / "t.csv", ROWS), label="outcome", client="site", categorical=["grade"])
    )
    train = data.splits["train"]
    dose = np.arange(30.0)
    expected = (dose - dose[train].mean()) / dose[train].std()
    np.testing.assert_allclose(data.x[:, 0], expected, rtol=1e-6, atol=1e-6)  # float32 rounding
    colours = np.array(["red", "green", "blue"])[np.arange(30) % 3]
    np.testing.assert_array_equal(data.x[:, 1:4], colours[:, None] == ["blue", "green", "red"])
    np.testing.assert_array_equal(data.x[:, 4:], (np.arange(30) % 2)[:, None] == [0, 1])  # 1 and 1.0 are one category
    assert data.x.shape == (30, 6)
    assert data.y.tolist() == [i % 5 for i in range(30)]
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert data.client.tolist() == [i % 2 for i in range(30)]
    assert data.client_names == ("a", "b")


def test_nothing_is_fitted_on_test_rows(tmp_path):
    path = tmp_path / "t.csv"
    before = csv(path=write(path, ROWS), label="outcome", client="site")
    train, test = before.splits["train"], before.splits["test"]
    rows = list(ROWS)
    for i in test:
        site, _, _, grade, outcome = rows[i].split(",")
        rows[i] = f"{site},1e9,violet,{grade},{outcome}"  # an outlier and a new category, in test rows alone
    after = csv(path=write(path, rows), label="outcome", client="site")
    assert np.array_equal(after.splits["test"], test)
    assert torch.equal(after.x[train], before.x[train])
    assert (after.x[test, 0] > 1e6).all()
    assert not after.x[test, 1:4].any()  # a category that training never saw is no category
    assert abs(before.x[train, 0].mean()) < 1e-6
    assert abs(before.x[train, 0].std(correction=0) - 1) < 1e-6


def test_missing_values_are_imputed_from_training_rows(tmp_path):
    rows = [row.split(",") for row in ROWS]
    for i, cell in {3: "", 7: "NA", 11: "?"}.items():
        rows[i][1] = cell
    rows[4][1], rows[5][2] = "-9", ""
    data = csv(
        path=write(tmp_path / "t.csv", map(",".join, rows)), label="outcome", client="site", missing={"dose": [-9]}
    )
    train = data.splits["train"]
    blank = np.isin(np.arange(30), [3, 4, 7, 11])
    known = np.arange(30.0)[train][~blank[train]]
    assert not data.x[blank, 0].any()  # the training mean is 0
    np.testing.assert_allclose(data.x[~blank, 0], (np.arange(30.0)[~blank] - known.mean()) / known.std(), rtol=1e-5)
    colours = np.array(["red", "green", "blue"])[np.arange(30) % 3]
    names, counts = np.unique(colours[np.setdiff1d(train, [5])], return_counts=True)
    assert data.x[5, 1:4].argmax() == counts.argmax()
    assert data.x[5, 1:4].sum() == 1
    assert list(names) == ["blue", "green", "red"]


def test_missing_values_may_be_text_and_hit_their_own_column_only(tmp_path):
    rows = [f"{i % 3},{i % 3},{'none' if i % 4 == 0 else 'some'},{i % 2}" for i in range(20)]
    path = write(tmp_path / "t.csv", rows, header="p,q,r,label")
    data = csv(path=path, label="label", missing={"p": [0], "r": ["none"]})
    assert not data.x[::3, 0].any()
    assert data.x[::3, 1].all()
    assert data.x.shape == (20, 3)  # "some" is the only category of r
    assert (data.x[:, 2] == 1).all()


def test_a_column_that_says_nothing_is_zero(tmp_path):
    rows = [f"7,,0.1,{i % 2}" for i in range(20)]
    data = check_dataset(csv(path=write(tmp_path / "t.csv", rows, header="same,empty,tenth,label"), label="label"))
    assert data.x.shape == (20, 3)
    assert not data.x.any()


@pytest.mark.parametrize(
    ("positive", "expected"),
    [
        (">0", [0, 1, 1, 1]),
        (">=2", [0, 0, 1, 1]),
        ("<1", [1, 0, 0, 0]),
        ("<= 1", [1, 1, 0, 0]),
        ("==2", [0, 0, 1, 0]),
        ("!=2.0", [1, 1, 0, 1]),
    ],
)
def test_positive_makes_a_label_binary(positive, expected, tmp_path):
    rows = [f"{i},{i % 4}" for i in range(12)]
    data = csv(path=write(tmp_path / "t.csv", rows, header="x,num"), label="num", positive=positive)
    assert data.y.tolist() == expected * 3
    assert data.num_classes == 2


def test_positive_may_compare_text(tmp_path):
    rows = [f"{i},{'yes' if i % 3 else 'no'}" for i in range(12)]
    path = write(tmp_path / "t.csv", rows, header="x,ill")
    assert csv(path=path, label="ill", positive="==yes").y.tolist() == [0, 1, 1] * 4
    with pytest.raises(UserError, match="'>yes' compares numbers, but 'ill' or 'yes' is text"):
        csv(path=path, label="ill", positive=">yes")


def test_classes_are_ordered_as_numbers_where_they_are_numbers(tmp_path):
    rows = [f"{i},{(2, 10, -1)[i % 3]}" for i in range(12)]
    data = csv(path=write(tmp_path / "t.csv", rows, header="x,y"), label="y")
    assert data.class_names == ("-1", "2", "10")
    assert data.y.tolist() == [1, 2, 0] * 4


def test_an_empty_client_is_none(tmp_path):
    rows = [f"{i},{('u', '', 'v')[i % 3]},{i % 2}" for i in range(12)]
    data = check_dataset(csv(path=write(tmp_path / "t.csv", rows, header="x,who,y"), label="y", client="who"))
    assert data.client.tolist() == [0, -1, 1] * 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"label": None}, "data.label is needed"),
        ({"label": "outcom"}, "data.label: the file has no column 'outcom'; did you mean 'outcome'?"),
        ({"client": "sight"}, "data.client: the file has no column 'sight'"),
        ({"features": ["dose", "colr"]}, "data.features: the file has no column 'colr'; did you mean 'colour'?"),
        ({"features": ["outcome"]}, "'outcome' is the label"),
        ({"features": []}, "no column is left"),
        ({"categorical": ["g"]}, "data.categorical: the file has no column 'g'"),
        ({"missing": {"dos": [0]}}, "data.missing: the file has no column 'dos'; did you mean 'dose'?"),
        ({"positive": "0"}, "data.positive must be a comparison like '>0' or '==yes', got '0'"),
        ({"path": "none.csv"}, "data.path: no file 'none.csv'; looked at"),
    ],
)
def test_wrong_arguments_are_named(arguments, match, tmp_path):
    given = {"path": write(tmp_path / "t.csv", ROWS), "label": "outcome"} | arguments
    with pytest.raises(UserError) as error:
        csv(**given)
    assert match in str(error.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "is not a CSV file with a header"),
        ("a,b\n1,2\n1,2,3\n", "is not a CSV file with a header"),
        ("a,a\n1,2\n1,2\n", "names a column twice"),
        ("a,label\n1,2\n", "has 1 rows"),
        ("a,label\n1,2\n1,\n", "row 2 has no 'label'"),
    ],
)
def test_wrong_files_are_named(content, match, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=match):
        csv(path=str(tmp_path / "t.csv"), label="label")


def test_the_four_hospitals():
    if not (REAL_DATA / "heart_disease").is_dir():
        pytest.skip(f"heart_disease is not in {REAL_DATA}; set FEDSIM_DATA")
    data = csv(
        path="heart_disease/heart.csv",
        root=str(REAL_DATA),
        label="num",
        client="hospital",
        positive=">0",
        categorical=["cp", "restecg", "slope", "thal"],
        missing={"chol": [0]},
    )
    assert check_dataset(data).client_names == ("cleveland", "hungarian", "switzerland", "va")
    assert np.bincount(data.client).tolist() == [303, 294, 123, 200]
    assert data.y.sum() == 509  # awk -F, 'NR > 1 && $NF > 0' heart.csv | wc -l
    # age sex trestbps chol fbs thalach exang oldpeak ca are numbers; cp has 4, restecg 3, slope 3, thal 3 categories.
    assert data.x.shape == (920, 9 + 4 + 3 + 3 + 3)
    switzerland = data.x[data.client == 2]
    cholesterol = 7  # after age, sex, four of cp, trestbps
    assert not switzerland[:, cholesterol].any()  # 0 at all 123: missing, so the training mean
    held = np.bincount(data.client[data.splits["test"]])
    assert (abs(held - 0.2 * np.array([303, 294, 123, 200])) < 1).all()
