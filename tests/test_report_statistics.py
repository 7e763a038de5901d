"""Student's t, intervals, paired tests and Holm's correction, against scipy and by hand."""

import doctest

import numpy as np
import pytest
from scipy import stats

from fedsim.report import statistics
from fedsim.report.statistics import holm, mean_of, paired, t_inside, t_quantile

DF = [1, 2, 3, 4, 5, 9, 10, 19, 30, 99, 1000]


def test_examples():
    result = doctest.testmod(statistics)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize("df", DF)
def test_t_is_scipys(df):
    for t in (0.0, 1e-3, 0.3, 1.0, 2.5, 12.7, 1e3):
        assert t_inside(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-12)  # 1 − x loses bits below 1e-16
    for level in (0.0, 0.5, 0.9, 0.95, 0.999):
        assert t_quantile(level, df) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-9, abs=1e-12)


def test_t_has_its_limits():
    assert t_inside(np.inf, 3) == 1
    assert t_inside(1.0, 1) == pytest.approx(0.5)  # Cauchy's quartile is 1
    for arguments in ((1.0, 0), (-1.0, 3)):
        with pytest.raises(ValueError, match="df >= 1 and t >= 0"):
            t_inside(*arguments)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        t_quantile(1.0, 3)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_intervals_and_paired_tests_are_scipys(count):
    rng = np.random.default_rng(count)
    a, b = rng.normal(0.9, 0.01, count), rng.normal(0.89, 0.02, count)
    low, high = stats.t.interval(0.95, count - 1, a.mean(), stats.sem(a))
    got = mean_of(a)
    assert (got.mean - got.half, got.mean + got.half) == pytest.approx((low, high), rel=1e-9)
    test, expected = paired(a, b), stats.ttest_rel(a, b)
    interval = expected.confidence_interval()
    assert test.p == pytest.approx(expected.pvalue, abs=1e-12)
    assert (test.mean - test.half, test.mean + test.half) == pytest.approx(tuple(interval), rel=1e-8)


def test_few_and_equal_runs():
    assert mean_of([0.5]) == statistics.Mean(0.5, None, 1)
    assert paired([0.5], [0.4]) is None
    assert paired([], []) is None
    assert paired([0.9, 0.8], [0.9, 0.8]).p == 1  # the same method under another name
    assert paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]).p == 0.25  # no spread but rounding: 3 of 3 signs agree, 2 / 2³
    assert paired([0.0, 0.0], [0.0, 0.0]).p == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_run_that_is_not_a_number_shows_nothing(value):
    one = paired([1.0, 1.1, value], [0.0, 0.0, 0.0])
    assert one.p == 1
    assert not np.isfinite(one.mean)
    assert np.isnan(one.half)
    assert paired([value, value], [value, value]).p == 1
    assert paired([np.inf, 0.0], [0.0, np.inf]).p == 1


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; never below one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]


def test_equal_methods_differ_at_the_nominal_rate():
    """2000 comparisons of a method with itself over 20 seeds: 5 % are called different, give or take 4 σ."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2000, 2, 20))
    called = sum(paired(a, b).p <= 0.05 for a, b in noise)
    assert abs(called - 100) <= 4 * np.sqrt(2000 * 0.05 * 0.95)


def test_holm_keeps_the_rate_of_a_whole_table():
    # Five equal methods against a baseline: in at most 5 % of tables is any called different, here at most by chance.
    rng = np.random.default_rng(1)
    tables = rng.normal(0.95, 0.01, size=(800, 6, 20))
    any_told = np.mean([min(holm([paired(x, rest[0]).p for x in rest[1:]])) <= 0.05 for rest in tables])
    unadjusted = np.mean([min(paired(x, rest[0]).p for x in rest[1:]) <= 0.05 for rest in tables])
    assert any_told <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 800)
    assert unadjusted > 0.12  # what the adjustment is for


def test_a_method_under_another_name_is_no_difference():
    # The plug-in's runs have the same seeds, so they are equal to the bit: not "significant because s is 0".
    same = paired([0.91, 0.93, 0.92] * 6 + [0.9, 0.95], [0.91, 0.93, 0.92] * 6 + [0.9, 0.95])
    assert (same.p, same.mean, same.count) == (1.0, 0.0, 20)
