"""Hand cases, sklearn as oracle, and limits of the classification and calibration metrics."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import tensor

from fedsim.metrics.calibration import adaptive_calibration_error, expected_calibration_error
from fedsim.metrics.classification import (
    Outputs,
    balanced_accuracy,
    concatenate,
    head_middle_tail,
    many_medium_few,
    outputs,
    overall,
    per_class_recall,
    per_client,
    segment_means,
    segment_sums,
)
from fedsim.rng import generator

SEEDS = range(5)


def _random(seed, num_samples=400, num_classes=6, dtype=torch.float64):
    rng = generator(seed, "test")
    logits = tensor(rng.normal(0, 3, (num_samples, num_classes)), dtype=dtype)
    return logits, tensor(rng.integers(0, num_classes, num_samples))


def _of(confidence, hits):
    """Outputs of which only confidence and correctness matter."""
    confidence = tensor(confidence, dtype=torch.float64)
    return Outputs(
        torch.zeros_like(confidence), torch.zeros(len(confidence), dtype=torch.int64), confidence, tensor(hits) > 0
    )


def test_outputs_of_two_samples_by_hand():
    # Softmax of (0, ln 3) is (1/4, 3/4); the first label is 1, the second 0.
    result = outputs(tensor([[0.0, np.log(3)], [0.0, np.log(3)]], dtype=torch.float64), tensor([1, 0]))
    torch.testing.assert_close(result.loss, -tensor([0.75, 0.25], dtype=torch.float64).log())
    torch.testing.assert_close(result.confidence, tensor([0.75, 0.75], dtype=torch.float64))
    assert result.predicted.tolist() == [1, 1]
    assert result.correct.tolist() == [True, False]
    assert overall(result)["accuracy"].item() == 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_overall_and_recall_agree_with_sklearn(seed):
    logits, labels = _random(seed)
    result = outputs(logits, labels)
    figures = overall(result)
    p = torch.softmax(logits, 1).numpy()
    # 1e-12: the same float64 sums in another order.
    np.testing.assert_allclose(figures["loss"], sk.log_loss(labels, p, labels=range(6)), rtol=1e-12)
    np.testing.assert_allclose(figures["accuracy"], sk.accuracy_score(labels, p.argmax(1)), rtol=1e-12)
    recall = per_class_recall(result, labels, 6)
    np.testing.assert_allclose(recall, sk.recall_score(labels, p.argmax(1), average=None), rtol=1e-12)
    np.testing.assert_allclose(balanced_accuracy(recall), sk.balanced_accuracy_score(labels, p.argmax(1)), rtol=1e-12)


def test_outputs_are_finite_for_huge_logits_and_ties_go_to_the_lowest_class():
    result = outputs(tensor([[1e30, -1e30], [2.0, 2.0]]), tensor([1, 1]))
    assert torch.isfinite(result.loss).all()
    assert result.predicted.tolist() == [0, 0]
    assert result.confidence.tolist() == [1.0, 0.5]


def test_batches_join_to_the_whole():
    logits, labels = _random(0)
    whole = outputs(logits, labels)
    parts = concatenate([outputs(logits[i : i + 150], labels[i : i + 150]) for i in range(0, 400, 150)])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_an_absent_class_has_no_recall_and_counts_nowhere():
    labels = tensor([0, 0, 2])
    recall = per_class_recall(Outputs(labels, labels, labels, tensor([True, False, True])), labels, 4)
    assert recall[[0, 2]].tolist() == [0.5, 1.0]
    assert recall[[1, 3]].isnan().all()
    assert balanced_accuracy(recall).item() == 0.75


def test_many_medium_few_at_the_thresholds():
    # 101 | 100, 20 | 19: > 100 is many, < 20 is few, both ends are medium. The NaN class is not tested.
    counts = tensor([101, 100, 20, 19, 500])
    recall = tensor([0.9, 0.6, 0.4, 0.1, torch.nan], dtype=torch.float64)
    figures = {name: round(value.item(), 12) for name, value in many_medium_few(recall, counts).items()}
    assert figures == {"accuracy_many": 0.9, "accuracy_medium": 0.5, "accuracy_few": 0.1}
    assert many_medium_few(recall, tensor([5] * 5))["accuracy_many"].isnan()
    with pytest.raises(ValueError, match=r"few must be <= many \+ 1.*few=9, many=5"):
        many_medium_few(recall, counts, many=5, few=9)


def test_head_middle_tail_by_cumulative_share():
    # Sorted 60, 15, 15, 6, 4 of 100: cumulative .60 .75 | .90 | .96 1.00.
    counts = tensor([15, 4, 60, 6, 15])
    recall = tensor([0.5, 0.1, 1.0, 0.3, 0.6], dtype=torch.float64)
    figures = {name: round(value.item(), 12) for name, value in head_middle_tail(recall, counts).items()}
    assert figures == {"accuracy_head": 0.75, "accuracy_middle": 0.6, "accuracy_tail": 0.2}
    with pytest.raises(ValueError, match=r"0 <= head <= middle <= 1, got 0.9, 0.5"):
        head_middle_tail(recall, counts, head=0.9, middle=0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_segments_agree_with_a_loop(seed):
    rng = generator(seed, "test")
    sizes = rng.integers(0, 5, 30)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    values = rng.normal(size=offsets[-1])
    sums = [sum(values[a:b].tolist()) for a, b in pairwise(offsets)]
    np.testing.assert_allclose(segment_sums(tensor(values), tensor(offsets)), sums, rtol=0, atol=1e-14)
    means = segment_means(tensor(values), tensor(offsets))
    np.testing.assert_array_equal(means.isnan(), sizes == 0)
    np.testing.assert_allclose(means[sizes > 0], np.array(sums)[sizes > 0] / sizes[sizes > 0], rtol=1e-12)


def test_a_segment_is_not_touched_by_the_ones_before_it():
    # Differences of a running sum would give NaN, 0 (1e30 swallows 1) and NaN behind the NaN.
    values = tensor([1e30, 1.0, torch.nan, 2.0])
    assert segment_sums(values, tensor([0, 1, 2, 3, 4]))[[0, 1, 3]].tolist() == [float(values[0]), 1.0, 2.0]


@pytest.mark.parametrize("offsets", [[0, 2, 5], [1, 2, 4], [0, 3]])
def test_offsets_that_miss_the_values_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets must go from 0 to the number of values, 4"):
        segment_sums(torch.ones(4), tensor(offsets))


def test_per_client_figures_average_to_the_overall_ones():
    logits, labels = _random(1)
    result = outputs(logits, labels)
    mine = per_client(result, tensor([0, 10, 10, 150, 400]))
    assert mine["num_samples"].tolist() == [10, 0, 140, 250]
    assert mine["accuracy"].isnan().tolist() == [False, True, False, False]
    for name, value in overall(result).items():
        weighted = (mine[name].nan_to_num() * mine["num_samples"]).sum() / 400
        np.testing.assert_allclose(weighted, value, rtol=1e-12)


def test_float32_losses_are_summed_in_float64():
    loss = torch.full((200_000,), 0.1)
    result = Outputs(loss, loss.long(), loss, loss > 0)
    # The mean of equal float32 numbers is that number, to float64 rounding of 2e5 terms.
    np.testing.assert_allclose(overall(result)["loss"], float(loss[0]), rtol=1e-12)
    np.testing.assert_allclose(segment_means(loss, tensor([0, 200_000])), float(loss[0]), rtol=1e-10)


def test_calibration_error_by_hand():
    # Bin of .95: |1 − 1.9| = .9; bin of .65: |2 − 1.3| = .7; (.9 + .7) / 4 = .4.
    case = _of([0.95, 0.95, 0.65, 0.65], [1, 0, 1, 1])
    np.testing.assert_allclose(expected_calibration_error(case), 0.4, rtol=1e-12)
    # Two bins of equal mass hold the same pairs; one bin: |3 − 3.2| / 4.
    np.testing.assert_allclose(adaptive_calibration_error(case, 2), 0.4, rtol=1e-12)
    np.testing.assert_allclose(adaptive_calibration_error(case, 1), 0.05, rtol=1e-12)


def test_a_bin_holds_its_upper_edge_and_not_its_lower_one():
    # With 2 bins .5 belongs to (0, .5], with .25: |1 − .75| / 2; were it in (.5, 1]: (.25 + .5) / 2.
    np.testing.assert_allclose(expected_calibration_error(_of([0.25, 0.5], [0, 1]), 2), 0.125, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_calibration_error_agrees_with_a_loop(seed, num_bins):
    logits, labels = _random(seed)
    result = outputs(logits, labels)
    error = 0.0
    for b in range(num_bins):
        inside = [i for i, c in enumerate(result.confidence.tolist()) if b / num_bins < c <= (b + 1) / num_bins]
        error += abs(sum(float(result.correct[i]) - float(result.confidence[i]) for i in inside))
    np.testing.assert_allclose(expected_calibration_error(result, num_bins), error / len(labels), rtol=1e-10)
    runs = np.array_split(np.argsort(result.confidence.numpy(), kind="stable"), num_bins)
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    equal = sum(abs((result.correct[r].double() - result.confidence[r]).sum().item()) for r in runs) / len(labels)
    if len(labels) % num_bins == 0:  # otherwise numpy cuts elsewhere
        np.testing.assert_allclose(adaptive_calibration_error(result, num_bins), equal, rtol=1e-10)


def test_calibration_limits():
    assert expected_calibration_error(_of([1.0, 1.0], [1, 1])).item() == 0
    assert expected_calibration_error(_of([1.0, 1.0], [0, 0])).item() == 1
    assert expected_calibration_error(_of([], [])).item() == 0
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):
        expected_calibration_error(_of([1.0], [1]), 0)
