"""Machines, availability and job times: by hand, and against the distributions that they are named after."""

import numpy as np
import pytest

from fedsim.clock import Clock, samples_passed
from fedsim.contracts import Partition, Phase
from fedsim.devices.availability import Bernoulli, Daily, Markov
from fedsim.devices.fleet import Fleet, Population, normals
from fedsim.devices.intertwined import Intertwined
from fedsim.devices.lognormal import LogNormal
from fedsim.devices.tiers import Tiers
from fedsim.devices.trace import Trace
from fedsim.devices.uniform import Uniform
from fedsim.errors import UserError
from fedsim.local import LocalTraining, schedule


def population(counts):
    counts = np.asarray(counts)
    return Population(counts.sum(1), counts)


CROWD = population(np.ones((20_000, 2), dtype=np.int64))


def test_uniform_fills_its_ranges_and_no_more():
    fleet = Uniform(speed=(2.0, 4.0), down_bandwidth=(1.0, 1.0), up_bandwidth=(5.0, 9.0))(CROWD, 3)
    assert 2 <= fleet.speed.min() < 2.001
    assert 3.999 < fleet.speed.max() < 4
    assert (fleet.down == 1).all()
    # The mean of 20,000 uniforms of width w is within 5 w / √(12 · 20,000) of its expectation.
    assert abs(fleet.up.mean() - 7) < 5 * 4 / np.sqrt(12 * 20_000)


def test_lognormal_has_its_median_and_spread_and_one_link_quality():
    fleet = LogNormal(speed=5.0, speed_sigma=0.7, down_bandwidth=8.0, up_bandwidth=2.0, bandwidth_sigma=0.5)(CROWD, 0)
    assert np.median(fleet.speed) == pytest.approx(5, rel=0.03)
    assert np.log(fleet.speed).std() == pytest.approx(0.7, rel=0.03)
    low, high = np.quantile(fleet.speed, [0.05, 0.95])
    assert high / low == pytest.approx(10, rel=0.06)  # exp(2 · 1.645 · 0.7) = 10.0, as the YAML says
    np.testing.assert_allclose(fleet.down / fleet.up, 4, rtol=1e-12)


def test_normals_are_normal_in_the_tail_too():
    z = normals(1, "x", 200_000)
    assert np.isfinite(z).all()
    # P(|z| > 1.96) = 0.05; five standard errors of a share of 200,000.
    assert abs((np.abs(z) > 1.96).mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 200_000)


def test_machines_depend_on_the_seed_and_the_client_alone():
    few = population(np.ones((5, 2), dtype=np.int64))
    for devices in (Uniform(), LogNormal(), Tiers()):
        np.testing.assert_array_equal(devices(few, 7).speed, devices(CROWD, 7).speed[:5])
        assert not np.array_equal(devices(CROWD, 7).speed, devices(CROWD, 8).speed)


def test_tiers_have_their_shares_and_the_slowest_is_slow():
    fleet = Tiers(speeds=(4.0, 1.0), fractions=(0.75, 0.25), down_bandwidths=(8.0, 2.0), up_bandwidths=(6.0, 3.0))(
        CROWD, 0
    )
    assert fleet.slow.mean() == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 20_000))
    assert set(zip(fleet.speed, fleet.down, fleet.up, fleet.slow, strict=True)) == {(4, 8, 6, False), (1, 2, 3, True)}


COUNTS = [[9, 0, 1], [0, 5, 5], [1, 0, 8], [0, 0, 0], [3, 3, 4], [0, 0, 8]]


def test_intertwined_slows_those_who_hold_the_class():
    fleet = Intertwined(target_class=2, slowdown=4, speed=8.0, down_bandwidth=4.0, up_bandwidth=2.0)(
        population(COUNTS), 0
    )
    # client 1 is tied between the classes 1 and 2 and counts as the lower; client 3 holds nothing
    np.testing.assert_array_equal(fleet.slow, [False, False, True, False, True, True])
    np.testing.assert_array_equal(fleet.speed, [8, 8, 2, 8, 2, 2])
    np.testing.assert_array_equal(fleet.up, [2, 2, 0.5, 2, 0.5, 0.5])
    fleet = Intertwined(target_class=2, form="most", num_slow=3)(population(COUNTS), 0)
    np.testing.assert_array_equal(np.flatnonzero(fleet.slow), [1, 2, 5])  # 8, 8 and 5 of the class
    fleet = Intertwined(target_class=1, form="most", num_slow=4)(population(COUNTS), 0)
    np.testing.assert_array_equal(np.flatnonzero(fleet.slow), [1, 4])  # nobody else has any


def test_a_trace_is_read_in_turn_or_by_client(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("speed, down_bandwidth,up_bandwidth\n1,10,100\n2,20,200\n")
    fleet = Trace(path=path)(population(COUNTS), 0)
    np.testing.assert_array_equal(fleet.speed, [1, 2, 1, 2, 1, 2])
    np.testing.assert_array_equal(fleet.up, [100, 200, 100, 200, 100, 200])
    rows = [f"{9 - k},1,{k % 2},1,{k}" for k in (5, 3, 1, 0, 2, 4)]
    table = "\n".join(["client,speed,down_bandwidth,slow,up_bandwidth", *(f"{r[-1]},{r[:-2]}" for r in rows)])
    path.write_text(table, encoding="utf-8-sig")  # as spreadsheets write it, with a mark in front of the first name
    fleet = Trace(path=path)(population(COUNTS), 0)
    np.testing.assert_array_equal(fleet.speed, [9, 8, 7, 6, 5, 4])
    np.testing.assert_array_equal(fleet.slow, [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed,down_bandwidth,up\n1,1,1\n", "no column 'up_bandwidth'"),
        ("speed,down_bandwidth,up_bandwidth\n", "no rows"),
        ("speed,down_bandwidth,up_bandwidth\n1,1,1\n1,fast,1\n", "line 3: down_bandwidth must be a number, got 'fast'"),
        ("speed,down_bandwidth,up_bandwidth\n0,1,1\n", "speed must be > 0 and finite, got 0.0 for client 0"),
        ("speed,down_bandwidth,up_bandwidth,client\n1,1,1,0\n", "no row for client 1"),
    ],
)
def test_a_bad_trace_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Trace(path=path)(population(COUNTS), 0)
    with pytest.raises(UserError, match="no such file"):
        Trace(path=tmp_path / "none.csv")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(speed=(2.0, 1.0)), lambda: Uniform(up_bandwidth=(0.0, 1.0)), lambda: LogNormal(speed=-1.0),
        lambda: LogNormal(speed_sigma=-0.1), lambda: Tiers(fractions=(0.5, 0.5)),
        lambda: Tiers(fractions=(0.5, 0.4, 0.2)),
        lambda: Intertwined(slowdown=0.5), lambda: Intertwined(target_class=9)(population(COUNTS), 0),
        lambda: Intertwined(num_slow=0), lambda: Bernoulli(probability=0.0), lambda: Daily(amplitude=0.6),
        lambda: Markov(mean_on=1.0, mean_off=2.0), lambda: Markov(mean_off=0.5), lambda: Bernoulli(slot_seconds=0.0),
    ],
)  # fmt: skip
def test_arguments_out_of_their_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must|makes nobody"):
        make()


# ---- availability

IDS = np.arange(5000)


def test_bernoulli_keeps_its_probabilities_and_draws_each_slot_anew():
    model = Bernoulli(probability=0.6, spread=0.3)
    there = np.stack([model.present(0, IDS, round, 0.0) for round in range(1, 201)])  # (200, 5000)
    assert there.mean() == pytest.approx(0.6, abs=0.01)
    chance = model.chance(0, IDS, 0.0)
    assert 0.3 <= chance.min() < 0.31
    assert 0.89 < chance.max() <= 0.9
    np.testing.assert_allclose(there.mean(0), chance, atol=5 * np.sqrt(0.25 / 200))
    again = Bernoulli(probability=0.6, slot_seconds=10.0)
    np.testing.assert_array_equal(again.present(0, IDS, 1, 3.0), again.present(0, IDS, 9, 9.9))
    assert not np.array_equal(again.present(0, IDS, 1, 3.0), again.present(0, IDS, 1, 10.0))


def test_the_daily_wave_has_its_peaks_and_time_zones():
    model = Daily(mean=0.5, amplitude=0.4, day_seconds=24.0)
    for now, chance in ((0, 0.9), (6, 0.5), (12, 0.1), (24, 0.9)):
        np.testing.assert_allclose(model.chance(0, IDS[:2], now), chance, atol=1e-12)
        assert model.present(0, IDS, 3, now).mean() == pytest.approx(chance, abs=0.04)
    spread = Daily(mean=0.5, amplitude=0.4, day_seconds=24.0, time_zones=1.0)
    assert spread.chance(0, IDS, 12.0).mean() == pytest.approx(0.5, abs=0.03)


def test_markov_stays_and_leaves_as_its_chain_does():
    model = Markov(mean_on=10.0, mean_off=4.0)
    state = np.stack([model.present(5, IDS, slot, 0.0) for slot in range(60)])  # (60, 5000)
    np.testing.assert_allclose(state.mean(1), 10 / 14, atol=0.035)  # stationary from the first slot on
    before, after = state[:-1], state[1:]
    # 59 · 5000 transitions: the shares are within 0.006 of 1/10 and 1/4 by five standard errors.
    assert (before & ~after).sum() / before.sum() == pytest.approx(1 / 10, abs=0.006)
    assert (~before & after).sum() / (~before).sum() == pytest.approx(1 / 4, abs=0.009)


def test_a_client_is_there_whoever_else_is_asked_for():
    for model in (Bernoulli(), Daily(time_zones=0.5), Markov()):
        some = np.array([3, 77, 4000])
        np.testing.assert_array_equal(model.present(2, some, 9, 5.0), model.present(2, IDS, 9, 5.0)[some])


# ---- times


def clock(**changes):
    fleet = Fleet(np.array([10.0, 20.0]), np.array([4.0, 8.0]), np.array([2.0, 1.0]), np.zeros(2, dtype=bool))
    return Clock(**{
        "fleet": fleet, "flops": 5.0, "samples": np.array([6.0, 8.0]), "down_bytes": 16.0, "up_bytes": 10.0, **changes,
    })  # fmt: skip


def test_a_jobs_time_by_hand():
    jobs = clock().jobs(np.array([0, 1]), 1)
    np.testing.assert_array_equal(jobs.download, [4, 2])  # 16 bytes at 4 and 8 a second
    np.testing.assert_array_equal(jobs.compute, [3, 2])  # 5 · 6 / 10 and 5 · 8 / 20
    np.testing.assert_array_equal(jobs.upload, [5, 10])
    np.testing.assert_array_equal(jobs.seconds, [12, 14])
    assert clock(fleet=None).jobs(np.array([0, 1]), 1).seconds.tolist() == [1, 1]


def test_partial_work_takes_its_share_of_the_computing_only():
    jobs = clock(partial_work=0.4, seed=3).jobs(np.array([0, 1, 0]), 2)
    assert ((jobs.work > 0.4) & (jobs.work <= 1)).all()
    np.testing.assert_allclose(jobs.compute, np.array([3, 2, 3]) * jobs.work)
    np.testing.assert_array_equal(jobs.download, [4, 2, 4])
    assert jobs.work[0] == jobs.work[2] != clock(partial_work=0.4, seed=3).jobs(np.array([0]), 3).work[0]


def test_a_lost_job_ends_on_the_way():
    ids = np.tile([0, 1], 1)
    lost = [clock(dropout=0.25).jobs(ids, round) for round in range(1, 2001)]
    share = np.mean([jobs.lost for jobs in lost])
    assert share == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 4000))
    for jobs in lost[:50]:
        whole = jobs.download + jobs.compute + jobs.upload
        assert (jobs.seconds[jobs.lost] < whole[jobs.lost]).all()
        np.testing.assert_array_equal(jobs.seconds[~jobs.lost], whole[~jobs.lost])


@pytest.mark.parametrize("phase", [None, Phase(local_steps=7), Phase(local_epochs=2)])
@pytest.mark.parametrize("training", [
    LocalTraining(batch_size=4), LocalTraining(batch_size=None, local_epochs=3),
    LocalTraining(batch_size=4, local_steps=5),
])  # fmt: skip
def test_samples_passed_are_those_of_the_schedule(training, phase):
    sizes = np.array([7, 0, 1, 12, 4])
    partition = Partition(np.arange(24), np.concatenate([[0], np.cumsum(sizes)]))
    plan = schedule(training, partition, np.arange(5), seed=0, round=1, phase=(0, phase))
    want = [
        sum(high - low for low, high in (plan.bounds(row, step) for step in range(int(plan.num_steps[row]))))
        for row in range(5)
    ]
    np.testing.assert_array_equal(samples_passed(training, partition, phase), want)
