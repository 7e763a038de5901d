"""Modes as pure functions: small event traces worked out by hand."""

import numpy as np
import pytest

from fedsim.clock import Clock, Jobs
from fedsim.devices.fleet import Fleet
from fedsim.modes.buffered import Async
from fedsim.modes.deadline import Deadline
from fedsim.modes.fixed_delay import FixedDelay
from fedsim.modes.mode import Flight, Server
from fedsim.modes.sync import Sync


class Scripted(Clock):
    """A clock whose jobs take the given seconds; a negative number is a job that is lost after so long."""

    def jobs(self, clients, round):
        seconds = np.asarray(self.samples)[clients]
        none, ones = np.zeros(len(clients)), np.ones(len(clients))
        return Jobs(clients, none, np.abs(seconds), none, ones, seconds < 0, ones)


def server(seconds, *, size=None, cohorts=None, slow=None):
    """Everybody who is not busy is drawn, up to the number asked for; or the given cohort of the round."""
    num = len(seconds)
    fleet = None if slow is None else Fleet(*[np.ones(num)] * 3, np.isin(np.arange(num), slow))

    def sample(round, wanted, busy, now):
        chosen = np.arange(num) if cohorts is None else np.array(cohorts[round - 1], dtype=np.int64)
        return np.setdiff1d(chosen, busy)[:wanted]

    clock = Scripted(fleet=fleet, flops=1.0, samples=np.array(seconds, dtype=float), down_bytes=0.0, up_bytes=0.0)
    return Server(clock=clock, cohort_size=num if size is None else size, num_clients=num, seed=0, sample=sample)


def trace(mode, server, rounds):
    """Return [(time, {client: version it was sent}, sent, lost)] of each round, and the last flight."""
    flight, rows = Flight.empty(), []
    for round in range(1, rounds + 1):
        arrivals, flight = mode(round, flight, server)
        assert (np.diff(arrivals.clients) > 0).all()
        # Through a checkpoint's plain form and back.
        flight = Flight.load(dict(flight.state()))
        got = dict(zip(arrivals.clients.tolist(), arrivals.received.tolist(), strict=True))
        rows.append((flight.now, got, arrivals.num_sent, arrivals.num_lost))
    return rows, flight


def test_sync_waits_for_the_slowest():
    rows, flight = trace(Sync(), server([1, 4, 2]), 2)
    assert rows == [(4, {0: 0, 1: 0, 2: 0}, 3, 0), (8, {0: 1, 1: 1, 2: 1}, 3, 0)]
    assert not len(flight.clients)


def test_sync_goes_on_without_those_that_drop_out():
    rows, _ = trace(Sync(), server([1, -4, 2]), 1)
    assert rows == [(4, {0: 0, 2: 0}, 3, 1)]  # its loss is seen after four seconds
    assert trace(Sync(), server([-1]), 1)[0] == [(1, {}, 1, 1)]


def test_a_round_without_anybody_passes_a_slot():
    for mode in (Sync(), Deadline(deadline=5.0), Async(buffer=1, concurrency=1)):
        rows, _ = trace(mode, server([2], cohorts=[[], [0]]), 2)
        assert rows == [(1, {}, 0, 0), (3, {0: 1}, 1, 0)]


def test_a_deadline_drops_who_is_late():
    rows, _ = trace(Deadline(deadline=4.0), server([1, 2, 5, 9]), 2)
    assert rows == [(4, {0: 0, 1: 0}, 4, 2), (8, {0: 1, 1: 1}, 4, 2)]
    assert trace(Deadline(deadline=5.0), server([1, 2, 5, 9]), 1)[0] == [(5, {0: 0, 1: 0, 2: 0}, 4, 1)]  # just in time


def test_late_replies_may_be_delivered_stale():
    rows, flight = trace(Deadline(deadline=4.0, late="deliver"), server([1, 2, 5, 9]), 4)
    assert rows == [
        (4, {0: 0, 1: 0}, 4, 0),
        (6, {0: 1, 1: 1, 2: 0}, 2, 0),  # 2 came at 5; 0 and 1 were asked again and came at 5 and 6
        (10, {0: 2, 1: 2, 3: 0}, 3, 0),  # 3 came at 9; 2 was asked at 6 and will come at 11
        (14, {0: 3, 1: 3, 2: 2}, 3, 0),  # 3 was asked at 10 and will come at 19
    ]
    assert (flight.clients.tolist(), flight.versions.tolist(), flight.due.tolist()) == ([3], [3], [19])


def test_over_selection_ends_with_as_many_as_were_wanted():
    rows, _ = trace(Deadline(over_selection=2.0), server([1, 2, 5, 9], size=2), 1)
    assert rows == [(2, {0: 0, 1: 0}, 4, 2)]
    rows, _ = trace(Deadline(over_selection=1.3), server([-1, 2, 5, 9, 9], size=3), 1)
    assert rows == [(9, {1: 0, 2: 0, 3: 0}, 4, 1)]  # asks ⌈3.9⌉ = 4
    rows, _ = trace(Deadline(over_selection=1.5), server([3, 3, 3], size=2), 1)
    assert rows == [(3, {0: 0, 1: 0, 2: 0}, 3, 0)]  # a tie counts whole


def test_without_limits_a_deadline_is_sync():
    for seconds in ([1, 4, 2], [1, -4, 2]):
        assert trace(Deadline(), server(seconds), 3)[0] == trace(Sync(), server(seconds), 3)[0]


def test_slow_clients_come_a_fixed_number_of_rounds_late():
    rows, flight = trace(FixedDelay(delay=2), server([1, 3, 2], slow=[1]), 5)
    assert [got for _, got, _, _ in rows] == [
        {0: 0, 2: 0}, {0: 1, 2: 1}, {0: 2, 1: 0, 2: 2}, {0: 3, 1: 1, 2: 3}, {0: 4, 1: 2, 2: 4},
    ]  # fmt: skip
    assert [now for now, *_ in rows] == [2, 4, 6, 8, 10]  # nobody waits for client 1
    assert flight.versions.tolist() == [3, 4]


def test_a_fixed_delay_follows_the_cohorts():
    rows, _ = trace(FixedDelay(delay=1), server([1, 1, 1], slow=[0, 1], cohorts=[[0], [1, 2], [0, 2], [2]]), 4)
    assert [got for _, got, _, _ in rows] == [{}, {0: 0, 2: 1}, {1: 1, 2: 2}, {0: 2, 2: 3}]
    assert trace(FixedDelay(delay=0), server([1, 1], slow=[1]), 2)[0] == trace(Sync(), server([1, 1]), 2)[0]


def test_fixed_delay_needs_to_know_who_is_slow():
    for slow in (None, []):
        with pytest.raises(ValueError, match="devices=intertwined"):
            FixedDelay().check(server([1], slow=slow))


def test_async_by_hand():
    rows, flight = trace(Async(buffer=2, concurrency=4), server([1.5, 3, 2, 10]), 4)
    assert rows == [
        (2.0, {0: 0, 2: 0}, 4, 0),
        (3.5, {0: 1, 1: 0}, 2, 0),  # 1 at 3.0; 0, sent version 1 at 2.0, at 3.5
        (5.0, {0: 2, 2: 1}, 2, 0),  # 2, sent version 1 at 2.0, at 4.0; 0 again at 3.5 + 1.5
        (6.5, {0: 3, 1: 2}, 2, 0),  # 1, sent version 2 at 3.5, and 0, at 5.0: both at 6.5
    ]
    assert dict(zip(flight.clients.tolist(), flight.due.tolist(), strict=True)) == {2: 7.0, 3: 10.0}
    assert dict(zip(flight.clients.tolist(), flight.versions.tolist(), strict=True)) == {2: 3, 3: 0}


def test_async_refills_a_slot_as_soon_as_it_is_free():
    rows, flight = trace(Async(buffer=2, concurrency=1), server([1, 1, 1]), 3)
    assert [now for now, *_ in rows] == [2, 4, 6]
    assert [sent for _, _, sent, _ in rows] == [2, 2, 2]
    assert [set(got.values()) for _, got, _, _ in rows] == [{0}, {1}, {2}]  # sent before the round's end
    assert not len(flight.clients)
    # Two slots for three clients of one second each: two begin at once, the third when one of them is back.
    rows, _ = trace(Async(buffer=3, concurrency=2), server([1, 1, 1]), 1)
    assert rows == [(2, {0: 0, 1: 0, 2: 0}, 3, 0)]


def test_async_frees_the_slots_of_lost_jobs():
    rows, _ = trace(Async(buffer=2, concurrency=3), server([-1, 2, 3]), 2)
    assert rows[0] == (3, {1: 0, 2: 0}, 3, 1)
    assert rows[1] == (6, {1: 1, 2: 1}, 3, 1)  # client 0 is asked again, and lost again
    rows, _ = trace(Async(buffer=2, concurrency=2), server([-1, 2]), 1)
    assert rows == [(2, {1: 0}, 2, 1)]  # nothing is left to wait for


def test_async_draws_the_order_of_a_tie_and_of_the_queue():
    first = [trace(Async(buffer=1, concurrency=9), server([1] * 9), 30)[0] for _ in range(2)]
    assert first[0] == first[1]
    order = [next(iter(got)) for _, got, _, _ in first[0][:9]]
    assert sorted(order) == list(range(9))
    assert order != sorted(order)


def test_async_with_everybody_is_sync():
    for seconds in ([1, 4, 2], [1, 1, 1]):
        assert trace(Async(buffer=3, concurrency=3), server(seconds), 4)[0] == trace(Sync(), server(seconds), 4)[0]


def test_async_never_sends_a_version_twice_to_a_client():
    rng = np.random.default_rng(0)
    seen = set()
    flight, world = Flight.empty(), server(rng.exponential(size=40))
    for round in range(1, 200):
        arrivals, flight = Async(buffer=5, concurrency=12)(round, flight, world)
        jobs = list(zip(arrivals.clients.tolist(), arrivals.received.tolist(), strict=True))
        assert len(jobs) == 5
        assert not seen & set(jobs)
        seen |= set(jobs)
        assert len(flight.clients) <= 12
        assert len(set(flight.clients.tolist())) == len(flight.clients)
        assert (arrivals.due <= flight.now).all()
        assert (flight.due >= flight.now).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Deadline(deadline=0.0), lambda: Deadline(late="never"), lambda: Deadline(over_selection=0.9),
        lambda: FixedDelay(delay=-1), lambda: Async(buffer=0), lambda: Async(concurrency=0),
        lambda: Async(buffer=3).check(server([1, 1])),
    ],
)  # fmt: skip
def test_arguments_out_of_their_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
