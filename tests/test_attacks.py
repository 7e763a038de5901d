"""Attacks against numpy in float64 loops and the papers' definitions, then in whole runs.

Sums of a few terms in another order: 1e-10 relative. Where a formula takes square roots of differences: 1e-8.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from fedsim import simulate
from fedsim.attacks.adversary import Adversary, byzantine_clients
from fedsim.attacks.alie import ALIE, largest_z
from fedsim.attacks.backdoor import Backdoor
from fedsim.attacks.contract import View
from fedsim.attacks.drop import Drop
from fedsim.attacks.fang import Fang
from fedsim.attacks.fang_krum import FangKrum, largest_scale
from fedsim.attacks.gaussian import Gaussian
from fedsim.attacks.ipm import IPM
from fedsim.attacks.label_flip import LabelFlip
from fedsim.attacks.mimic import Mimic
from fedsim.attacks.min_max import MinMax
from fedsim.attacks.min_sum import MinSum
from fedsim.attacks.nonfinite import NonFinite
from fedsim.attacks.optimised import Optimised, line_maximum
from fedsim.attacks.random_uniform import Random
from fedsim.attacks.sign_flip import SignFlip
from fedsim.build import build
from fedsim.build_uplink import check_uplink
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset, Partition
from fedsim.errors import UserError
from fedsim.evaluation import _dealt
from fedsim.laws import cohort_of
from fedsim.layout import Layout
from fedsim.loop import Loop
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.krum import Krum
from fedsim.strategies.median import Median
from fedsim.uplink import Uplink

SEEDS = range(5)
STATELESS = [SignFlip(), IPM(), ALIE(), MinMax(), MinSum(), Fang(), Gaussian(), Random(), Drop(), NonFinite()]


def rows_of(seed, honest=7, byzantine=3, size=12):
    rng = np.random.default_rng(seed)
    order = rng.permutation(honest + byzantine)
    return rng.normal(size=(honest + byzantine, size)) + rng.normal(size=size), order < byzantine


def view_of(seed, knowledge="all", rule=None, **shape):
    rows, byzantine = rows_of(seed, **shape)
    cohort = cohort_of(rows, seed=seed, round=3)

    def aggregate(updates):
        return rule(replace(cohort, updates=updates), rule.init(cohort.layout, len(cohort)))[0]

    view = View(
        cohort=cohort, byzantine=torch.from_numpy(byzantine), knowledge=knowledge,
        aggregate=aggregate if rule else None,
    )  # fmt: skip
    return view, rows[~byzantine], rows[byzantine]


def sent(attack, view, state=None):
    return attack.rows(view, {} if state is None else state)[0].numpy()


# --- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_sign_flip_turns_each_attackers_own_update(seed):
    view, _, own = view_of(seed)
    np.testing.assert_array_equal(sent(SignFlip(scale=10.0), view), -10 * own)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("knowledge", ["all", "own"])
def test_ipm_goes_against_the_known_mean(seed, knowledge):
    view, honest, own = view_of(seed, knowledge)
    known = honest if knowledge == "all" else own
    want = [-0.3 * sum(x[j] for x in known) / len(known) for j in range(known.shape[1])]
    np.testing.assert_allclose(sent(IPM(epsilon=0.3), view), [want] * 3, rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_alie_is_the_mean_less_z_population_deviations(seed):
    view, honest, _ = view_of(seed)
    # K = 10, F = 3: s = 6 - 3 = 3 supporters, z = Φ⁻¹((7 - 3)/7)
    z = stats.norm.ppf(4 / 7)
    want = honest.mean(0) - z * np.sqrt(((honest - honest.mean(0)) ** 2).mean(0))
    np.testing.assert_allclose(sent(ALIE(), view), [want] * 3, rtol=1e-9)
    np.testing.assert_allclose(sent(ALIE(z=-2.0), view), [honest.mean(0) + 2 * honest.std(0)] * 3, rtol=1e-9)


@pytest.mark.parametrize(
    ("clients", "byzantine", "share"),
    [
        (50, 12, 24 / 38),  # the paper's size: s = 26 - 12
        (10, 2, 4 / 8),  # s = 4: half of the honest
        (10, 1, 0.5),  # (9 - 5)/9 is below a half: z would be negative
        (9, 6, 2 / 3),  # attackers are a majority, s = 5 - 6: one supporter is asked for
        (4, 4, 0.5),  # nobody is honest
    ],
)
def test_alies_z_by_hand(clients, byzantine, share):
    assert math.isclose(largest_z(clients, byzantine), stats.norm.ppf(share), rel_tol=1e-9, abs_tol=1e-12)


def directions(honest, name):
    mean = honest.mean(0)
    return {"std": -honest.std(0), "sign": -np.sign(mean), "unit": -mean / np.linalg.norm(mean)}[name]


def by_halving(holds, step=1.0):
    """The paper's search for the largest γ for which something holds."""
    gamma, best = 0.0, 0.0
    for _ in range(200):
        if holds(gamma + step):
            gamma = best = gamma + step
        else:
            step /= 2
    return best


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["std", "sign", "unit"])
def test_min_max_against_a_search(seed, name):
    view, honest, _ = view_of(seed)
    p = directions(honest, name)
    widest = max(np.linalg.norm(x - y) for x in honest for y in honest)
    gamma = by_halving(lambda g: max(np.linalg.norm(honest.mean(0) + g * p - x) for x in honest) <= widest)
    np.testing.assert_allclose(sent(MinMax(perturbation=name), view)[0], honest.mean(0) + gamma * p, rtol=1e-8)
    assert gamma > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["std", "sign", "unit"])
def test_min_sum_against_a_search(seed, name):
    view, honest, _ = view_of(seed)
    p = directions(honest, name)
    widest = max(sum(np.sum((x - y) ** 2) for y in honest) for x in honest)
    gamma = by_halving(lambda g: sum(np.sum((honest.mean(0) + g * p - x) ** 2) for x in honest) <= widest)
    np.testing.assert_allclose(sent(MinSum(perturbation=name), view)[0], honest.mean(0) + gamma * p, rtol=1e-8)
    assert gamma > 0


@pytest.mark.parametrize("attack", [MinMax(), MinSum(), MinMax(perturbation="unit"), ALIE()], ids=str)
def test_equal_honest_updates_leave_no_room(attack):
    cohort = cohort_of(np.ones((5, 4)))
    view = View(cohort=cohort, byzantine=torch.arange(5) < 2)
    np.testing.assert_allclose(sent(attack, view), np.ones((2, 4)), rtol=1e-12)
    nothing = View(cohort=cohort_of(np.zeros((5, 4))), byzantine=torch.arange(5) < 2)
    np.testing.assert_array_equal(sent(attack, nothing), np.zeros((2, 4)))


@pytest.mark.parametrize("seed", SEEDS)
def test_fang_lies_just_beyond_the_extremes_against_the_mean(seed):
    view, honest, _ = view_of(seed, size=200)
    got, b = sent(Fang(b=2.0), view), 2.0
    for j, k in itertools.product(range(200), range(3)):
        column = honest[:, j]
        if column.mean() < 0:
            m = column.max()
            low, high = (m, b * m) if m > 0 else (m, m / b)
        else:
            m = column.min()
            low, high = (m / b, m) if m > 0 else (b * m, m)
        assert low - 1e-12 <= got[k, j] <= high + 1e-12
    assert len({row.tobytes() for row in got}) == 3  # drawn for each attacker


def test_fang_by_hand():
    # column 0: honest -1 … 2, mean 0.5 >= 0: below min -1, in [-2, -1]. Column 1: honest -4, -1: max -1 < 0, [-1, -0.5]
    rows = np.array([[-1.0, -4.0], [2.0, -1.0], [0.0, 0.0]])
    view = View(cohort=cohort_of(rows), byzantine=torch.tensor([False, False, True]))
    ((a, b),) = sent(Fang(), view)
    assert -2 <= a <= -1
    assert -1 <= b <= -0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_fang_krum_sends_the_largest_step_that_krum_takes(seed):
    rule = Krum(num_byzantine=5)  # 7 neighbours: 4 twins and 3 honest
    view, honest, _ = view_of(seed, rule=rule, honest=9, byzantine=5)
    row = sent(FangKrum(), view)[0]
    signs = np.sign(honest.mean(0))
    step = -(row * signs)
    np.testing.assert_allclose(step, step[0], rtol=1e-12)  # one λ for all coordinates
    start = largest_scale(torch.from_numpy(honest), 14, 5)
    halvings = math.log2(start / step[0])
    assert abs(halvings - round(halvings)) < 1e-9
    taken = view.step(view.attacked(view.all(torch.from_numpy(row))))
    np.testing.assert_array_equal(taken, row)
    if round(halvings):  # twice as far it is not taken
        bolder = view.step(view.attacked(view.all(torch.from_numpy(2 * row))))
        assert not np.array_equal(bolder, 2 * row)


@pytest.mark.parametrize("seed", SEEDS)
def test_fang_krums_bound_in_loops(seed):
    _, honest, _ = view_of(seed)
    d = honest.shape[1]
    nearest = min(sum(sorted(np.sum((x - y) ** 2) for y in honest)[1 : 1 + 10 - 3 - 2]) for x in honest)
    want = math.sqrt(nearest / ((10 - 6 - 1) * d)) + max(np.linalg.norm(x) for x in honest) / math.sqrt(d)
    assert math.isclose(largest_scale(torch.from_numpy(honest), 10, 3), want, rel_tol=1e-10)


def test_fang_krum_ends_where_the_rule_never_follows():
    view, _, _ = view_of(0, rule=FedAvg())
    assert np.abs(sent(FangKrum(least=1e-3), view)).max() < 2e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_mimic_against_loops(seed):
    attack, layout = Mimic(), Layout.vector([12])
    state, mean, z = attack.init(layout), np.zeros(12), None
    for count in range(3):
        rows, byzantine = rows_of(100 * seed + count)
        cohort = cohort_of(rows, seed=seed, round=count + 1)
        honest = rows[~byzantine]
        got, state = attack.rows(View(cohort=cohort, byzantine=torch.from_numpy(byzantine)), state)
        mean = (count * mean + honest.mean(0)) / (count + 1)
        if z is None:
            z = cohort.rng("mimic").normal(size=12)
            z /= np.linalg.norm(z)
        spread = sum((x - mean) * ((x - mean) @ z) for x in honest)
        z = (count * z + spread / np.linalg.norm(spread)) / (count + 1)
        z /= np.linalg.norm(z)
        want = max(honest, key=lambda x: (x - mean) @ z)
        np.testing.assert_array_equal(got.numpy(), [want] * 3)
        np.testing.assert_allclose(state["direction"], z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_mimic_learns_at_the_same_speed_whatever_the_scale_of_updates(scale):
    directions = []
    for factor in (1.0, scale):
        attack = Mimic()
        state = attack.init(Layout.vector([12]))
        for count in range(4):
            rows, byzantine = rows_of(count)
            view = View(cohort=cohort_of(factor * rows, round=count + 1), byzantine=torch.from_numpy(byzantine))
            _, state = attack.rows(view, state)
        directions.append(state["direction"])
    np.testing.assert_allclose(directions[1], directions[0], rtol=1e-7, atol=1e-9)


def test_mimic_stays_with_one_side():
    """Two camps far apart: once a side is chosen, its clients are copied in every round."""
    attack, chosen = Mimic(), []
    state = attack.init(Layout.vector([3]))
    for count in range(6):
        rng = np.random.default_rng(count)
        rows = rng.normal(size=(8, 3)) * 0.1 + np.where(np.arange(8) < 4, 5, -5)[:, None]
        view = View(cohort=cohort_of(rows, round=count + 1), byzantine=torch.arange(8) == 7)
        got, state = attack.rows(view, state)
        chosen.append(float(got[0, 0].sign()))
    assert len(set(chosen)) == 1


# --- noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "law"),
    [
        (Gaussian(std=3.0, mean=-1.0), stats.norm(-1, 3)),
        (Random(low=-2.0, high=6.0), stats.uniform(-2, 8)),
    ],
    ids=["gaussian", "random"],
)
def test_noise_is_of_its_law(attack, law):
    view, _, _ = view_of(0, size=4000)
    got = sent(attack, view)
    assert stats.kstest(got.ravel(), law.cdf).pvalue > 1e-3  # 12,000 draws of one fixed seed
    assert abs(np.corrcoef(got)[0, 1]) < 0.06  # attackers are independent: 4/√4000


def test_drop_loses_the_share_it_says_and_keeps_the_rest():
    view, _, own = view_of(0, size=5000)
    got = sent(Drop(probability=0.1), view)
    assert abs((got == 0).mean() - 0.1) < 4 * math.sqrt(0.09 / 15000)
    np.testing.assert_array_equal(got[got != 0], own[got != 0])
    assert not sent(Drop(probability=1.0), view).any()


@pytest.mark.parametrize("attack", [Gaussian(), Random(), Drop(), Fang()], ids=lambda a: type(a).__name__)
def test_noise_follows_seed_and_round(attack):
    rows, byzantine = rows_of(0)
    draws = {
        key: sent(
            attack, View(cohort=cohort_of(rows, seed=key[0], round=key[1]), byzantine=torch.from_numpy(byzantine))
        ).tobytes()
        for key in itertools.product(range(2), range(1, 3))
    }
    assert len(set(draws.values())) == 4
    again = View(cohort=cohort_of(rows, seed=1, round=2), byzantine=torch.from_numpy(byzantine))
    assert sent(attack, again).tobytes() == draws[1, 2]


# --- what holds for all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [*STATELESS, Mimic(), Backdoor(boost=3.0)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_attack_sends_one_row_an_attacker_and_leaves_the_cohort_alone(attack, dtype, count):
    rows = torch.from_numpy(rows_of(1)[0]).to(dtype)
    before = rows.clone()
    view = View(cohort=cohort_of(rows), byzantine=torch.arange(10) < count)  # 10: nobody is honest
    init = getattr(attack, "init", None)
    got, _ = attack.rows(view, init(Layout.vector([12])) if init else {})
    assert got.shape == (count, 12)
    assert got.dtype == dtype
    assert torch.equal(rows, before)
    assert isinstance(attack, NonFinite) or bool(torch.isfinite(got).all())


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (SignFlip, {"scale": 0.0}),
        (IPM, {"epsilon": -1.0}),
        (ALIE, {"z": math.inf}),
        (MinMax, {"perturbation": "max"}),
        (MinSum, {"perturbation": "max"}),
        (Fang, {"b": 1.0}),
        (FangKrum, {"least": 0.0}),
        (Gaussian, {"std": 0.0}),
        (Gaussian, {"mean": math.nan}),
        (Random, {"low": 1.0}),
        (Drop, {"probability": 0.0}),
        (NonFinite, {"kind": "zero"}),
        (LabelFlip, {"kind": "random"}),
        (Backdoor, {"target": -1}),
        (Backdoor, {"poisoned_fraction": 0.0}),
        (Backdoor, {"trigger_size": 0}),
        (Backdoor, {"boost": 0.0}),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        kind(**arguments)


# --- those that know the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [0.07, 0.9, 40.0])
def test_line_maximum_finds_a_peak(peak):
    found = line_maximum(lambda t: -abs(math.log(t / peak)), 1.0, 40)
    assert abs(math.log(found / peak)) < 0.05


def test_line_maximum_asks_no_more_than_it_may():
    asked = []
    line_maximum(lambda t: asked.append(t) or -abs(t - 3), 1.0, 7)
    assert len(asked) == 7
    assert line_maximum(lambda t: t, 2.0, 1) == 2.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("attack", "name"), [(IPM(epsilon=1.0), "epsilon"), (ALIE(z=1.0), "z")])
@pytest.mark.parametrize("rule", [Median(), Krum(num_byzantine=3)], ids=["median", "krum"])
def test_optimised_does_no_less_harm_than_where_it_starts(seed, attack, name, rule):
    view, honest, _ = view_of(seed, rule=rule)

    def harm(rows):
        return np.linalg.norm(view.step(view.attacked(torch.from_numpy(rows))).numpy() - honest.mean(0))

    best = sent(Optimised(attack=attack, parameter=name), view)
    assert harm(best) >= harm(sent(attack, view)) - 1e-12


def test_against_the_mean_more_is_always_worse():
    """IPM moves the plain mean in proportion to ε: 16 questions double it 15 times."""
    view, honest, _ = view_of(0, rule=FedAvg())
    got = sent(Optimised(attack=IPM(epsilon=1.0), parameter="epsilon"), view)
    np.testing.assert_allclose(got[0], -(2.0**15) * honest.mean(0), rtol=1e-10)


def test_optimised_needs_a_strength():
    for name in ("size", "knowledge"):
        with pytest.raises(ValueError, match="parameter must name a number > 0 of IPM"):
            Optimised(attack=IPM(), parameter=name)
    with pytest.raises(ValueError, match="of ALIE, got z=None"):
        Optimised(attack=ALIE(), parameter="z")


def test_an_attack_that_asks_needs_a_rule():
    view, _, _ = view_of(0)
    with pytest.raises(ValueError, match="know the server's rule"):
        sent(FangKrum(), view)


# --- who attacks -----------------------------------------------------------------------------------------------


def test_attackers_are_keyed_nested_and_counted():
    clients = np.array([3, 4, 7, 8, 9, 11, 20, 21, 30, 31])
    sets = [set(byzantine_clients(5, clients, f / 10).tolist()) for f in range(11)]
    assert [len(s) for s in sets] == list(range(11))
    assert all(a < b for a, b in itertools.pairwise(sets))
    assert sets[10] == set(clients.tolist())
    assert len(byzantine_clients(5, clients, 0.25)) == 3  # halves upward
    others = [tuple(byzantine_clients(seed, clients, 0.3)) for seed in range(20)]
    assert len(set(others)) > 10


def test_an_attack_has_a_seed_of_its_own_or_the_runs():
    def attackers(*words):
        made = build(compose(["model=logreg", "partition.seed=7", "attack=alie", "attack.fraction=0.3", *words]))
        return tuple(np.flatnonzero(made.uplink.adversary.byzantine).tolist())

    assert attackers("attack.seed=3", "seed=0") == attackers("attack.seed=3", "seed=1") == attackers("seed=3")
    assert len({attackers(f"seed={seed}") for seed in range(3)}) > 1


def adversary(attack, fraction=0.4, **settings):
    return Adversary(attack, clients=np.arange(10), num_clients=10, fraction=fraction, **settings)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_the_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        adversary(SignFlip(), fraction)


def test_an_object_without_an_attack_is_refused():
    with pytest.raises(ValueError, match="int has neither"):
        adversary(3)
    with pytest.raises(ValueError, match="knowledge must be all or own"):
        adversary(SignFlip(), knowledge="some")


def test_rounds_without_attackers_pass_untouched():
    who = adversary(SignFlip())
    honest = np.flatnonzero(~who.byzantine)[:3]
    cohort = cohort_of(np.ones((3, 4)), clients=torch.from_numpy(honest))
    byzantine, rows = who.rows(cohort)
    assert not byzantine.any()
    assert rows.shape == (0, 4)


def test_figures_by_hand():
    who = adversary(SignFlip(), 0.1)
    (bad,) = np.flatnonzero(who.byzantine)
    ids = np.sort(np.array([bad, (bad + 1) % 10, (bad + 2) % 10]))
    rows = np.where((ids == bad)[:, None], 99.0, [[3.0, 4.0]])
    cohort = cohort_of(rows, [1, 2, 3], clients=torch.from_numpy(ids))
    figures = who.figures(cohort, torch.tensor([3.0, 0.0], dtype=torch.float64))
    assert figures["num_byzantine"] == 1
    assert figures["byzantine"].tolist() == (ids == bad).astype(float).tolist()
    assert math.isclose(float(figures["honest_distance"]), 4 / 5)  # ‖(3, 0) - (3, 4)‖ / 5
    assert math.isclose(float(figures["honest_cosine"]), 3 / 5)


# --- poisoned data ---------------------------------------------------------------------------------------------


def images(num=60, classes=5):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((num, 1, 6, 6)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, classes, num))
    train, test = np.arange(num - 20), np.arange(num - 20, num)
    client = rng.integers(0, 10, num)
    return Dataset(x=x, y=y, splits={"train": train, "test": test}, num_classes=classes, client=client)


TRAIN = Partition(np.random.default_rng(1).permutation(40), np.arange(0, 41, 4))  # 10 clients of 4


@pytest.mark.parametrize(("kind", "flip"), [("reverse", lambda c: 4 - c), ("next", lambda c: (c + 1) % 5)])
def test_label_flip_touches_the_attackers_training_labels_alone(kind, flip):
    data, who = images(), adversary(LabelFlip(kind=kind))
    before = data.y.clone()
    poisoned = who.poison(data, TRAIN)
    mine = set(np.concatenate([TRAIN.of(k) for k in np.flatnonzero(who.byzantine)]).tolist())
    assert len(mine) == 16
    for i in range(60):
        assert int(poisoned.y[i]) == (flip(int(before[i])) if i in mine else int(before[i]))
    assert torch.equal(data.y, before)
    assert poisoned.x is data.x


def test_backdoor_stamps_the_share_it_says_and_adds_a_split():
    data, who = images(), adversary(Backdoor(target=2, poisoned_fraction=0.5, trigger_size=2))
    x, y = data.x.clone(), data.y.clone()
    poisoned = who.poison(data, TRAIN)
    value = float(x[:40].max())
    stamped = {i for i in range(60) if not torch.equal(poisoned.x[i], x[i])}
    for k in range(10):
        touched = [i for i in TRAIN.of(k).tolist() if i in stamped]
        assert len(touched) == (2 if who.byzantine[k] else 0)
    for i in stamped:
        want = x[i].clone()
        want[0, 4:, 4:] = value
        assert torch.equal(poisoned.x[i], want)
        assert poisoned.y[i] == 2
    others = [i for i in range(40, 60) if y[i] != 2]
    added = poisoned.splits["backdoor"]
    assert len(added) == len(others)
    for i, j in zip(others, added.tolist(), strict=True):
        want = x[i].clone()
        want[0, 4:, 4:] = value
        assert torch.equal(poisoned.x[j], want)
        assert poisoned.y[j] == 2
    assert torch.equal(poisoned.y[40:60], y[40:])
    assert poisoned.client.tolist()[60:] == [-1] * len(others)
    assert torch.equal(data.x, x)


def test_backdoor_on_features_takes_the_last_ones():
    data = images()._replace(x=torch.rand(60, 8, generator=torch.Generator().manual_seed(0)))
    poisoned = adversary(Backdoor(trigger_size=3, trigger_value=7.0, poisoned_fraction=1.0)).poison(data, TRAIN)
    changed = (poisoned.x[:60] != data.x).nonzero()
    assert set(changed[:, 1].tolist()) == {5, 6, 7}
    assert len(changed) == 16 * 3


@pytest.mark.parametrize(
    ("attack", "data", "message"),
    [
        (Backdoor(), images()._replace(x=torch.zeros(60, 6, dtype=torch.int64)), "tokens"),
        (Backdoor(trigger_size=7), images(), r"trigger_size=7 does not fit inputs of shape \(1, 6, 6\)"),
        (Backdoor(target=5), images(), "below the number of classes, 5"),
    ],
)
def test_a_backdoor_that_does_not_fit_is_a_users_error(attack, data, message):
    with pytest.raises(UserError, match=message):
        adversary(attack).poison(data, TRAIN)


# --- whole runs ------------------------------------------------------------------------------------------------

SMALL = ("model=logreg", "partition.num_clients=10", "fraction=0.8", "metrics.every=1")


def run(folder, *overrides, num_rounds=3, **settings):
    return simulate(*SMALL, *overrides, num_rounds=num_rounds, folder=folder, **settings)


def weights(result):
    return load_file(result.folder / "model.safetensors")


def same(a, b):
    return all(torch.equal(weights(a)[name], value) for name, value in weights(b).items())


def test_no_attackers_change_no_bit(tmp_path):
    quiet = run(tmp_path / "a", "strategy=median")
    idle = run(tmp_path / "b", "strategy=median", "attack=alie", "attack.fraction=0")
    assert same(quiet, idle)
    assert idle.rounds[-1]["num_byzantine"] == 0
    loud = run(tmp_path / "c", "strategy=median", "attack=alie", "attack.z=9")
    assert not same(quiet, loud)


@dataclass(frozen=True)
class Spy:
    """FedAvg that keeps what it sees."""

    seen: list

    def init(self, layout, num_clients):
        return {}

    def __call__(self, cohort, state):
        self.seen.append((cohort.clients.clone(), cohort.rows.clone()))
        return cohort.rows.mean(0), state, {"score": cohort.weights}


def test_attackers_change_their_own_rows_alone_and_stay_the_same(tmp_path):
    seen, clean = [], []
    result = run(tmp_path / "a", "attack=sign_flip", "attack.scale=2", "attack.fraction=0.3", strategy=Spy(seen))
    run(tmp_path / "b", strategy=Spy(clean))
    who = byzantine_clients(0, np.arange(10), 0.3)
    (ids, attacked), (_, honest) = seen[0], clean[0]  # before round 2 the models differ
    turned = np.isin(ids.numpy(), who)
    assert turned.any()
    np.testing.assert_array_equal(attacked[~turned], honest[~turned])
    np.testing.assert_array_equal(attacked[turned], -2 * honest[turned])
    table = pq.read_table(result.folder / "clients.parquet").to_pandas()
    told = table.dropna(subset="byzantine").groupby("client")["byzantine"]
    assert (told.min() == told.max()).all()
    assert set(told.max()[told.max() == 1].index) == set(who.tolist())
    assert table["score"].notna().any()  # a rule's (K,) metrics are columns
    row = result.rounds[0]
    assert row["num_byzantine"] == turned.sum()
    n = np.array([table.query("round == 1 and client == @k")["num_samples"].item() for k in ids.tolist()])
    mean = np.average(honest.numpy()[~turned], axis=0, weights=n[~turned])
    far = np.linalg.norm(attacked.numpy().mean(0) - mean) / np.linalg.norm(mean)
    assert math.isclose(row["honest_distance"], far, rel_tol=1e-4)  # float32 rows
    assert row["honest_accuracy_mean"] != row["client_accuracy_mean"]


@pytest.mark.parametrize("words", [("compressor=error_feedback",), ("strategy=scaffold",)], ids=["errors", "controls"])
def test_what_attackers_send_leaves_what_clients_keep_alone(tmp_path, words):
    """Attackers train, compress and keep like everybody else: no state is that of a poisoned update."""
    kept = []
    for name, attack in (("a", ()), ("b", ("attack=sign_flip", "attack.scale=1e3", "attack.fraction=0.3"))):
        loop = Loop(build(compose([*SMALL, *words, *attack, "num_rounds=1"])), tmp_path / name, Observer())
        loop.run()
        store = loop.uplink.store if "compressor" in words[0] else loop.task.store
        kept.append(store.get(np.arange(10), torch.device("cpu")))
    assert kept[0].keys() == kept[1].keys() != set()
    for name, value in kept[0].items():
        assert value.any()
        assert torch.equal(value, kept[1][name])


@pytest.mark.parametrize("kind", ["infinity", "not_a_number"])
def test_rows_that_are_not_finite_are_dropped_and_counted(tmp_path, kind):
    result = run(tmp_path / "a", "attack=nonfinite", f"attack.kind={kind}", "attack.fraction=0.3")
    who = byzantine_clients(0, np.arange(10), 0.3)
    assert result.summary["num_dropped"] > 0
    for row in result.rounds:
        assert row["num_participants"] + row["num_dropped"] == 8
        assert row["num_byzantine"] == 0  # none reached the rule
        assert 1 <= row["num_dropped"] <= len(who)
    assert all(bool(torch.isfinite(value).all()) for value in weights(result).values())


def test_rows_that_are_not_finite_can_stop_a_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"the update of client .* is not finite"):
        run(tmp_path / "a", "attack=nonfinite", "on_bad_update=raise")
    with pytest.raises(RuntimeError, match="none of 8 updates is finite"):
        run(tmp_path / "b", "attack=nonfinite", "attack.fraction=1")


def test_poisoned_labels_need_no_rows_and_do_harm(tmp_path):
    clean = run(tmp_path / "a", num_rounds=6)
    flipped = run(tmp_path / "b", "attack=label_flip", "attack.fraction=0.5", num_rounds=6)
    assert flipped.summary["plan"]["rows"] == "streamed"
    assert flipped.summary["accuracy"] < clean.summary["accuracy"] - 0.1
    assert flipped.rounds[-1]["num_byzantine"] > 0


def test_a_backdoor_succeeds_where_accuracy_does_not_show_it(tmp_path):
    arguments = ("attack=backdoor", "attack.trigger_size=2", "partition=iid")
    idle = run(tmp_path / "a", *arguments, "attack.fraction=0", num_rounds=8)
    active = run(tmp_path / "b", *arguments, "attack.fraction=0.4", num_rounds=8)
    assert active.summary["backdoor_accuracy"] > idle.summary["backdoor_accuracy"] + 0.5
    assert active.summary["accuracy"] > idle.summary["accuracy"] - 0.1
    assert active.summary["plan"]["rows"] == "streamed"
    boosted = run(tmp_path / "c", *arguments, "attack.boost=3", "attack.fraction=0.1", num_rounds=1)
    assert boosted.summary["plan"]["rows"] == "held: Backdoor"


def test_attack_seed_is_of_the_attack_alone(tmp_path):
    words = ("attack=gaussian", "attack.fraction=0.3", "seed=4")
    seen = {seed: [] for seed in ("null", 4, 5)}
    runs = {seed: run(tmp_path / str(seed), *words, f"attack.seed={seed}", strategy=Spy(seen[seed])) for seed in seen}
    assert same(runs["null"], runs[4])  # null: the run's seed
    partitions = [np.load(runs[seed].folder / "partition.npz") for seed in (4, 5)]
    for name in partitions[0].files:
        np.testing.assert_array_equal(partitions[0][name], partitions[1][name])
    for (mine, _), (theirs, _) in zip(seen[4], seen[5], strict=True):
        assert torch.equal(mine, theirs)  # cohorts
    (ids, first), (_, second) = seen[4][0], seen[5][0]  # before round 2 the models differ
    who = [np.isin(ids.numpy(), byzantine_clients(seed, np.arange(10), 0.3)) for seed in (4, 5)]
    assert (who[0] != who[1]).any()
    honest = ~(who[0] | who[1])
    assert torch.equal(first[honest], second[honest])  # initial model, order of the data
    noise = [rows[attackers][0] for rows, attackers in zip((first, second), who, strict=True)]
    assert not torch.isclose(*noise).any()  # what they send is drawn anew, too


def test_where_clients_keep_parameters_accuracy_is_the_honest_clients(tmp_path):
    result = run(
        tmp_path / "a", "strategy=local", "attack=label_flip", "attack.fraction=0.3", "metrics.clients_every=1",
        "metrics.finetune_steps=1",
    )  # fmt: skip
    row = result.rounds[-1]
    assert row["accuracy"] == pytest.approx(row["honest_accuracy_weighted_mean"], abs=1e-12)
    assert row["accuracy"] > row["client_accuracy_weighted_mean"] + 0.05
    assert row["honest_finetuned_accuracy_mean"] > row["client_finetuned_accuracy_mean"] + 0.05
    table = pq.read_table(result.folder / "clients.parquet").to_pandas().query("round == 3")
    honest = ~table["client"].isin(byzantine_clients(0, np.arange(10), 0.3))
    weights = table["num_test_samples"][honest]
    assert row["accuracy"] == pytest.approx(np.average(table["test_accuracy"][honest], weights=weights), abs=1e-12)
    everyone = run(tmp_path / "b", "strategy=local", "attack=label_flip", "attack.fraction=1", num_rounds=1)
    assert 0 <= everyone.rounds[-1]["accuracy"] <= 1  # nobody else is there


def test_a_backdoor_is_measured_where_clients_keep_parameters(tmp_path):
    words = ("model.local=bias", "attack=backdoor", "attack.trigger_size=2", "partition=iid")
    idle = run(tmp_path / "a", *words, "attack.fraction=0", num_rounds=5)
    active = run(tmp_path / "b", *words, "attack.fraction=0.5", "attack.poisoned_fraction=0.9", num_rounds=5)
    assert active.summary["backdoor_accuracy"] > idle.summary["backdoor_accuracy"]


@pytest.mark.parametrize("count", [2, 7, 20])
def test_triggered_samples_are_dealt_to_the_chosen_clients(count):
    positions, chosen = np.arange(100, 100 + count), np.array([1, 4, 5])
    dealt = _dealt(positions, chosen, 7)
    assert dealt.num_clients == 7
    assert sorted(dealt.indices) == positions.tolist()
    assert dealt.sizes[[0, 2, 3, 6]].sum() == 0
    assert np.ptp(dealt.sizes[chosen]) <= 1
    np.testing.assert_array_equal(dealt.of(4), positions[1::3])


def test_an_attacks_memory_is_resumed(tmp_path):
    from fedsim.console import Observer
    from fedsim.simulation import resume

    attacked = ("attack=mimic", "attack.fraction=0.4", "strategy=krum", "checkpoint.every=1")
    whole = run(tmp_path / "a", *attacked, num_rounds=4)
    run(tmp_path / "b", *attacked, num_rounds=2)
    parts = resume(tmp_path / "b", ["num_rounds=4"], Observer())
    assert same(whole, parts)
    forgetful = run(tmp_path / "c", *attacked, "attack.knowledge=own", num_rounds=4)
    assert not same(whole, forgetful)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attack.fraction=0.2"], "attack=none has no attackers"),
        (["attack=ipm", "attack.fraction=1.5"], r"attack: fraction must be in \[0, 1\]"),
        (["attack=fang_krum", "strategy=flower/krum"], "FangKrum has to know the server's rule"),
        (["attack=ipm", "strategy=centralized"], "a pooled strategy has no clients"),
        (["attack=ipm", "strategy=local"], "IPM acts on updates, and here no parameter leaves its client"),
        (["attack=ipm", "attack.epsilon=0"], r"attack.epsilon must be > 0"),
        (["attack=backdoor", "attack.trigger_size=9"], "does not fit inputs"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a", *overrides)


def test_foreign_clients_are_not_ours_to_attack():
    uplink = Uplink(Layout.vector([3]), 10, 10, adversary=adversary(SignFlip()))
    with pytest.raises(UserError, match="with client=flower_app use none"):
        check_uplink(uplink, FedAvg(), foreign=True)
    check_uplink(uplink, FedAvg(), foreign=False)


def test_an_attack_on_a_flower_strategy(tmp_path):
    result = run(tmp_path / "a", "attack=sign_flip", "attack.scale=5", "strategy=flower/fedavg", num_rounds=2)
    clean = run(tmp_path / "b", "strategy=flower/fedavg", num_rounds=2)
    assert not same(result, clean)
    assert result.rounds[-1]["num_byzantine"] > 0


def test_an_attack_of_ones_own(tmp_path):
    result = run(tmp_path / "a", "attack.fraction=0.3", attack=SignFlip(scale=2.0), strategy=Spy([]))
    named = run(tmp_path / "b", "attack=sign_flip", "attack.scale=2", "attack.fraction=0.3", strategy=Spy([]))
    assert same(result, named)
