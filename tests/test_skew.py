"""Skew figures: hand cases, naive loops, bounds, and the finite-sample bias of an iid split."""

from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from fedsim.contracts import Partition
from fedsim.metrics.skew import label_counts, skew
from fedsim.partition.iid import IID

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=50)
MATRICES = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**6))


def matrix(case):
    counts = np.random.default_rng(case[2]).negative_binomial(0.4, 0.05, case[:2])
    counts[0, 0] += 1
    return counts


def test_hand_case_of_two_clients():
    # p = (.5, .5), (.9, .1), equal sizes, q = (.7, .3); all from the definitions by hand, to the digits given.
    result = skew([[50, 50], [90, 10]])
    np.testing.assert_allclose(2 * result.client_tv, [0.4, 0.4])
    np.testing.assert_allclose(result.client_js, [0.02101, 0.03243], atol=5e-6)
    np.testing.assert_allclose(result.client_hellinger, [0.14524, 0.18185], atol=5e-6)
    np.testing.assert_allclose(result.client_effective_classes, [2, 1.3841], atol=5e-5)
    assert result.mutual_information == pytest.approx(0.1017, abs=5e-5)


@pytest.mark.parametrize(("sizes", "expected"), [((1, 1, 1, 1), 0), ((0, 0, 0, 4), 0.75), ((1, 3), 0.25)])
def test_hand_cases_of_gini(sizes, expected):
    assert skew([[n] for n in sizes]).size_gini == pytest.approx(expected)


def test_disjoint_clients():
    result = skew([[10, 0], [0, 10]])
    np.testing.assert_allclose(result.client_tv, 0.5)
    assert result.mutual_information == pytest.approx(log(2))  # the label says the client
    assert result.missing_classes == 0.5
    np.testing.assert_allclose(result.client_effective_classes, 1)


def test_equal_clients_have_no_skew():
    result = skew([[3, 6, 1], [30, 60, 10]])
    for vector in (result.client_tv, result.client_js, result.client_hellinger):
        np.testing.assert_allclose(vector, 0, atol=1e-8)  # the root of 1e-16
    assert result.mutual_information == pytest.approx(0, abs=1e-15)


@EXAMPLES
@given(case=MATRICES)
def test_against_naive_loops(case):
    counts = matrix(case)
    num_clients, num_classes = counts.shape
    total = counts.sum()
    q = [counts[:, c].sum() / total for c in range(num_classes)]
    result = skew(counts)
    information = zeros = held = 0
    for k in range(num_clients):
        size = counts[k].sum()
        if size == 0:
            assert np.isnan(result.client_tv[k])
            assert np.isnan(result.client_effective_classes[k])
            continue
        held += 1
        p = [counts[k, c] / size for c in range(num_classes)]
        assert result.client_tv[k] == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
        assert result.client_js[k] == pytest.approx(jensenshannon(p, q) ** 2, abs=1e-12)
        hellinger = sqrt(sum((sqrt(a) - sqrt(b)) ** 2 for a, b in zip(p, q, strict=True)) / 2)
        assert result.client_hellinger[k] == pytest.approx(hellinger)
        assert result.client_effective_classes[k] == pytest.approx(exp(entropy(p)))
        information += size / total * entropy(p, q)
        zeros += sum(counts[k, c] == 0 and q[c] > 0 for c in range(num_classes))
    assert result.mutual_information == pytest.approx(information, abs=1e-12)
    assert result.missing_classes == pytest.approx(zeros / (held * sum(x > 0 for x in q)))
    sizes = counts.sum(1)
    gini = sum(abs(int(a) - int(b)) for a in sizes for b in sizes) / (2 * num_clients**2 * sizes.mean())
    assert result.size_gini == pytest.approx(gini)
    assert result.size_cv == pytest.approx(np.std(sizes) / np.mean(sizes))


@EXAMPLES
@given(case=MATRICES)
def test_bounds(case):
    counts = matrix(case)
    result, slack = skew(counts), 1e-12
    held = counts.sum(1) > 0
    assert (result.client_tv[held] < 1).all()
    assert (result.client_js[held] <= log(2) + slack).all()
    assert (result.client_hellinger[held] <= 1 + slack).all()
    assert (result.client_effective_classes[held] >= 1 - slack).all()
    assert (result.client_effective_classes[held] <= counts.shape[1] + slack).all()
    most = min(entropy(counts.sum(0)), entropy(counts.sum(1)))
    assert 0 <= result.mutual_information <= most + slack
    assert -slack <= result.size_gini <= (len(counts) - 1) / len(counts) + slack
    # Hellinger and total variation bound each other (Le Cam).
    hellinger, tv = result.client_hellinger[held], result.client_tv[held]
    assert (hellinger**2 <= tv + slack).all()
    assert (tv <= hellinger * np.sqrt(2 - hellinger**2) + slack).all()


def test_an_iid_split_has_the_mutual_information_of_its_finite_sample():
    # (K − 1)(C − 1) / (2N), the mean of a χ² over 2N; five of its standard deviations √(2·171) / (2N), over 20 seeds.
    labels = np.arange(5000) % 10
    values = [
        skew(label_counts(labels, IID(num_clients=20)(labels, np.random.default_rng(s)), 10)).mutual_information
        for s in range(20)
    ]
    assert np.mean(values) == pytest.approx(19 * 9 / 10_000, abs=5 * sqrt(2 * 171) / 10_000 / sqrt(20))


def test_rows_are_names_values_and_meanings():
    rows = skew([[5, 5, 0], [9, 1, 0], [0, 0, 0]]).rows()
    table = {name: value for name, value, _ in rows}
    assert len(table) == len(rows)
    assert all(meaning for *_, meaning in rows)
    assert table["label TV, mean"] == pytest.approx(0.2)
    assert table["label TV, max"] == pytest.approx(0.2)
    assert (table["size, min"], table["size, max"], table["empty clients"]) == (0, 10, 1)
    assert table["size, mean"] == pytest.approx(20 / 3)
    assert table["missing classes"] == 0
    weighted = {name: value for name, value, _ in skew([[30, 0], [5, 5]]).rows()}
    tv = skew([[30, 0], [5, 5]]).client_tv
    assert weighted["label TV, weighted"] == pytest.approx(0.75 * tv[0] + 0.25 * tv[1])


def test_counts_are_of_each_client_and_class():
    partition = Partition(np.array([4, 0, 2, 1]), np.array([0, 3, 3, 4]))
    np.testing.assert_array_equal(
        label_counts([1, 0, 1, 2, 2], partition, 4), [[0, 2, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    )
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 0 to 2"):
        label_counts([1, 0, 1, 2, 2], partition, 2)


@pytest.mark.parametrize("counts", [[[0, 0]], [1, 2], np.zeros((0, 3))])
def test_no_samples_have_no_skew(counts):
    with pytest.raises(ValueError, match="counts must be a matrix"):
        skew(counts)
