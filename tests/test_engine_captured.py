"""A step is recorded once and then runs without Python, with the same numbers."""

import copy
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from fedsim import simulate
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Partition, Phase
from fedsim.engine import play, script
from fedsim.engine.auto import make_engine
from fedsim.engine.captured import Captured
from fedsim.engine.record import NotRecordable, record
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task, Weighed
from fedsim.layout import Layout
from fedsim.local import LocalTraining

SIZES = np.array([7, 1, 40, 13, 4, 4, 9, 22, 3, 17, 5, 30])
N = int(SIZES.sum())
RNG = torch.Generator().manual_seed(0)
X = torch.randn(N, 8, generator=RNG, dtype=torch.float64)
Y = torch.randint(0, 5, (N,), generator=RNG)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)).double()


def make_task(module=None, objective=None, x=X, **training):
    module = copy.deepcopy(module or mlp())
    shared = Layout.of(dict(module.named_parameters()))
    settings = {"lr": 0.1, "batch_size": 20, "local_epochs": 2, **training}
    return Task(
        module=module, shared=shared, local=Layout((), ()), buffers=Layout((), ()),
        objective=objective or CrossEntropy(),
        training=LocalTraining(**settings), x=x, y=Y, store=ClientStore(len(SIZES), {}),
        partition=Partition(np.random.default_rng(0).permutation(N), np.concatenate([[0], np.cumsum(SIZES)])),
    )  # fmt: skip


def make_job(task, number=1, **changes):
    own = dict(task.module.named_parameters())
    start = task.shared.join({name: own[name].detach().clone() for name in task.shared.names})
    clients = np.arange(len(SIZES))
    settings = {"clients": clients, "received": np.zeros(len(clients), dtype=np.int64), "models": {0: start}}
    settings |= {"broadcasts": {}, "buffers": start[:0], "state": {}, "round": number, "key": number, "lr": 0.1}
    return Job(**settings | changes)


def trained(engine, job):
    out = torch.empty(len(job), engine.task.shared.size, dtype=torch.float64)
    return out, engine.train(job, out)


@pytest.fixture
def capture():
    opened = []

    def make(task, threads=2):
        opened.append(Captured(task, threads=threads))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.mark.parametrize("batch_size", [20, None])
def test_a_first_cohort_compiles_what_others_will_need(capture, monkeypatch, batch_size):
    seen = []
    monkeypatch.setattr(play, "compiled", lambda *given: seen.append(len(given[0])) or script.compiled(*given))
    engine, job = capture(make_task(batch_size=batch_size)), make_job(make_task())
    whole, _ = trained(capture(make_task(batch_size=batch_size)), job)
    seen.clear()
    for clients in ([2, 11], [0, 1, 3], list(range(12))):
        none = np.zeros(len(clients), dtype=np.int64)
        out, _ = trained(engine, replace(job, clients=np.array(clients), received=none))
        assert torch.equal(out, whole[clients])
    assert len(seen) == 1


def test_batches_that_do_other_things_are_not_compiled_before_they_come(capture, monkeypatch):
    """Clients without them train; a client that brings one is told."""
    own, full = play.Play._program, 20

    def program(self, kind):
        return own(self, kind) if kind.size == full else own(self, kind)._replace(seen=frozenset({99}))

    engine, job = capture(make_task(batch_size=full)), make_job(make_task())
    monkeypatch.setattr(play.Play, "_program", program)
    none = np.zeros(1, dtype=np.int64)
    trained(engine, replace(job, clients=np.array([2]), received=none))  # two batches of 20
    with pytest.raises(NotRecordable, match="other things"):
        trained(engine, replace(job, clients=np.array([0]), received=none))


@pytest.mark.parametrize("batch_size", [20, 16, None])
@pytest.mark.parametrize("extra", [{}, {"momentum": 0.9}, {"clip_norm": 0.1, "weight_decay": 0.1}], ids=str)
def test_batches_that_are_padded_to_a_size_with_a_program_train_as_they_are(capture, batch_size, extra):
    arguments = {"batch_size": batch_size, **extra}
    job = make_job(task := make_task(**arguments))
    one, left = trained(Sequential(task), job)
    other, also = trained(capture(make_task(**arguments)), job)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(also.extras["train_loss"], left.extras["train_loss"], rtol=1e-12, atol=0)
    assert torch.equal(also.num_steps, left.num_steps)
    torch.testing.assert_close(also.square_norms, one.square().sum(1))


def test_few_sizes_have_programs(capture):
    engine = capture(make_task(batch_size=40))
    trained(engine, make_job(engine.task))
    sizes = {kind.size for play in engine._plays.values() for kind in play.programs}
    assert sizes <= {5, 10, 15, 20, 25, 30, 35, 40}


def test_bits_hang_on_neither_threads_nor_calls_nor_neighbours(capture):
    job = make_job(make_task())
    engine = capture(make_task(), threads=1)
    first = trained(engine, job)[0]
    for _ in range(4):  # an optimising executor would change its products after a call or two
        assert torch.equal(trained(engine, job)[0], first)
    assert torch.equal(trained(capture(make_task(), threads=3), job)[0], first)
    some = np.array([2, 7, 9])
    assert torch.equal(trained(engine, job.take(some))[0], first[some])


def test_rows_summed_as_they_end_are_the_weighted_sum_of_the_rows(capture):
    engine, job = capture(make_task()), make_job(make_task())
    rows, left = trained(engine, job)
    c = torch.rand(len(job), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    total = torch.ones(engine.task.shared.size, dtype=torch.float64)
    block = engine.train_sum(job, c, total)
    torch.testing.assert_close(total, 1 + c @ rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.square_norms, left.square_norms)
    again = torch.ones_like(total)
    capture(make_task(), threads=3).train_sum(job, c, again)
    assert torch.equal(again, total)


@dataclass(frozen=True)
class Reporting(CrossEntropy):
    """Sends the number of its steps, or says that it weighs as many."""

    weighs: bool = False

    def finish(self, params, context):
        steps = torch.as_tensor(context.num_steps, dtype=torch.float64)
        return {}, {"steps": steps}, steps if self.weighs else None


@pytest.mark.parametrize("engine", [Captured, Sequential])
@pytest.mark.parametrize("weighs", [False, True])
def test_rows_that_send_more_are_summed_as_they_end_unless_they_say_what_they_weigh(capture, engine, weighs):
    job, seen = make_job(make_task()), []

    def start():
        task = make_task(objective=Reporting(weighs))
        return capture(task) if engine is Captured else Sequential(task)

    held, _ = Trainer(start()).collect(job)
    running = start()
    trainer, summed = Trainer(running), running.train_sum
    running.train_sum = lambda *given: [seen.append(1), summed(*given)][1]
    for _ in range(2):
        cohort, _ = trainer.stream(job, lambda cohort: cohort.weights)
        share = (held.weights / held.weights.sum()).double()
        torch.testing.assert_close(cohort.streamed.mean, share @ held.rows, rtol=0, atol=1e-12)
        assert torch.equal(cohort.extras["steps"], held.extras["steps"])
        assert torch.equal(cohort.weights, held.weights)
    assert len(seen) == (1 if weighs else 2)  # who weighs itself is not asked again
    if weighs:
        with pytest.raises(Weighed):
            summed(job, torch.ones(len(job), dtype=torch.float64), torch.zeros_like(held.rows[0]))


def test_a_row_that_is_not_finite_is_in_no_sum(capture):
    task = make_task(x=X.clone())
    bad = task.partition.of(4)
    task.x[bad] = float("nan")
    job = make_job(task)
    total = torch.zeros(task.shared.size, dtype=torch.float64)
    engine = capture(task)
    trainer = Trainer(engine)
    cohort, _ = trainer.stream(job, lambda cohort: cohort.weights)
    assert trainer.bad == [4]
    assert 4 not in cohort.clients.tolist()
    good = np.delete(np.arange(len(SIZES)), 4)
    rows = trained(engine, job.take(good))[0]
    weights = torch.from_numpy(SIZES[good] / SIZES[good].sum())
    torch.testing.assert_close(cohort.streamed.mean, weights @ rows, rtol=0, atol=1e-12)
    engine.train_sum(job, torch.zeros(len(job), dtype=torch.float64), total)
    assert torch.equal(total, torch.zeros_like(total))


def test_a_stream_that_is_summed_natively_is_the_one_in_blocks(capture):
    job = make_job(make_task())
    seen = []

    def ahead(cohort):
        seen.append(type(cohort.extras).__name__)
        return cohort.weights * cohort.num_steps

    def after(cohort):
        return cohort.weights * cohort.num_steps + 0 * cohort.extras["train_loss"]

    one, _ = Trainer(capture(make_task())).stream(job, ahead)
    other, _ = Trainer(capture(make_task())).stream(job, after)
    assert seen == ["Unforeseen"]
    torch.testing.assert_close(one.streamed.mean, other.streamed.mean, rtol=0, atol=1e-12)
    for name in ("clients", "weights", "num_steps"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.extras["train_loss"], other.extras["train_loss"])


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(x) if float(x.sum()) < 1e9 else x


class Draws(Asks):
    def forward(self, x):
        return self.head(x + 0 * torch.rand_like(x))


class Counts(Asks):
    calls = 0

    def forward(self, x):
        Counts.calls += self.training
        return self.head(x) * (1 + Counts.calls)


@dataclass(frozen=True)
class Counting(CrossEntropy):
    def direction(self, grads, params, context):
        return {name: grad / (1 + context.step) for name, grad in grads.items()}, {}


@dataclass(frozen=True)
class Phased(CrossEntropy):
    def phases(self):
        return (Phase(local_epochs=1),)


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (lambda: make_task(Asks().double()), "a tensor's value is asked for"),
        (lambda: make_task(Draws().double()), "aten::rand_like draws from torch's global generator"),
        (lambda: make_task(objective=Counting()), "what a step does depends on its number"),
        (lambda: make_task(objective=Phased()), "the objective has phases"),
        (lambda: make_task(objective=object()), "neither criterion nor loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_said_and_trained_otherwise(task, why):
    with pytest.raises(ValueError, match=why):
        Captured(task())
    engine, _ = make_engine(task(), "auto", cohort=12, threads=1)
    assert engine.plan.get("kernels") != "captured"
    engine.close()


def test_a_model_that_depends_on_more_than_its_inputs_is_found_out():
    Counts.calls = 0
    with pytest.raises(ValueError, match="more than its inputs"):
        Captured(make_task(Counts().double()))


def test_recording_writes_into_what_the_function_writes_into_and_reads_the_rest_as_it_is_then():
    weight = torch.randn(3, 4)

    def function(given):
        a, b = given
        b.mul_(2)
        return [(a @ weight + b).relu_().sum()]

    inputs = [torch.randn(2, 3), torch.randn(2, 4)]
    program = record(function, [t.clone() for t in inputs])
    other = [torch.randn(2, 3), torch.randn(2, 4)]
    mine, theirs = [t.clone() for t in other], [t.clone() for t in other]
    torch.testing.assert_close(program(mine), function(theirs))
    torch.testing.assert_close(mine[1], theirs[1])


def test_a_product_is_accumulated_in_place_unless_what_it_reads_has_moved_by_then():
    def factorised(given):  # the second step reads the first factor as it was before its step
        a, b, x = given
        moved = [a.detach().requires_grad_(), b.detach().requires_grad_()]
        with torch.enable_grad():
            grads = torch.autograd.grad((x @ (moved[0] @ moved[1])).square().sum(), moved)
        a.sub_(grads[0])
        b.sub_(grads[1])
        return [a.sum()]

    def plain(given):
        weight, x, g = given
        weight.sub_((x.t() @ g).t().t())
        return [weight.sum()]

    examples = [torch.randn(4, 3), torch.randn(3, 5), torch.randn(2, 4)]
    recorded = record(factorised, [t.clone() for t in examples])
    mine, theirs = [t.clone() for t in examples], [t.clone() for t in examples]
    recorded(mine)
    factorised(theirs)
    torch.testing.assert_close(mine, theirs)
    assert "addmm_" in record(plain, [torch.randn(4, 5), torch.randn(2, 4), torch.randn(2, 5)]).body


def test_images_train_channels_last(capture):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(12, 5)

        def forward(self, x):
            return self.head(functional.max_pool2d(self.conv(x).relu(), 2).flatten(1))

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(N, 2, 4, 4, dtype=torch.float64)
    job = make_job(task := make_task(net, x=x))
    one, _ = trained(Sequential(task), job)
    other, _ = trained(capture(make_task(net, x=x)), job)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


def test_a_run_does_not_import_a_compiler(tmp_path):
    script = f"""
import sys
from fedsim import simulate
simulate("strategy=fedavg", num_rounds=1, folder={str(tmp_path / "run")!r})
print(sorted({{"torch._dynamo", "torch._inductor", "sympy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"  # each takes half a second or more


def test_a_recording_lets_go_of_values_and_confuses_none_that_lies_where_another_did():
    seen = []

    def function(given):
        x = given[0]
        for k in range(6):  # each value's memory is likely the one of the value before the last
            x = x * 2 + k
            seen.append(StorageWeakRef(x.untyped_storage()))
            held.append(sum(not ref.expired() for ref in seen))
        return [x]

    held = []
    program = record(function, [torch.ones(1 << 18)])
    assert max(held) <= 2  # the newest and the one it is made of
    x = torch.arange(5.0)
    expected = function([x])[0]
    assert torch.equal(program([x.clone()])[0], expected)


def test_what_is_written_into_is_written_as_soon_as_nobody_needs_it_as_it_was():
    def function(given):
        a, b, x = given
        grad_b = x * 2
        grad_a = grad_b * a  # reads a, which may not move before
        other = grad_a + b  # reads b
        a.sub_(grad_a)
        b.sub_(grad_b)
        return [other * 3 + a.view(-1)]

    def inputs():
        return [torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]), torch.tensor([0.5, -1.0])]

    program = record(function, inputs())
    lines = program.body.splitlines()
    written = [k for k, line in enumerate(lines) if "sub_" in line]
    assert written == [3, 5], program.body  # each before whatever does not read it as it was
    assert "i0" in lines[2]
    mine, theirs = inputs(), inputs()
    assert torch.equal(program(mine)[0], function(theirs)[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_modules_parameters_are_a_lanes_memory_and_hold_no_models_size_beside_it():
    layers = [nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2, padding=1), nn.Flatten(), nn.Linear(27, 5)]
    task = make_task(nn.Sequential(*layers).double(), x=X)
    engine = Captured(task, threads=2)
    lane = engine._lanes.get()
    assert {p.untyped_storage()._cdata for p in task.module.parameters()} == {lane.flat.untyped_storage()._cdata}
    assert {p.untyped_storage()._cdata for p in lane.params} == {lane.flat.untyped_storage()._cdata}
    assert not engine.step.start


@dataclass(frozen=True)
class Weighs(CrossEntropy):
    def finish(self, params, context):
        return {}, {"share": torch.ones(())}, torch.ones(())


@pytest.mark.parametrize(
    ("objective", "coefficients"),
    [
        (Weighs(), lambda cohort: cohort.weights),
        (CrossEntropy(), lambda cohort: cohort.extras.get("train_loss", cohort.weights)),
        (CrossEntropy(), lambda cohort: 1 + cohort.weights * ("train_loss" in cohort.extras)),
    ],
    ids=["weights of its own", "asks by get", "asks by in"],
)
def test_coefficients_that_hang_on_what_clients_send_are_taken_after_they_sent_it(capture, objective, coefficients):
    one, _ = Trainer(Sequential(make_task(objective=objective))).stream(make_job(make_task()), coefficients)
    other, _ = Trainer(capture(make_task(objective=objective))).stream(make_job(make_task()), coefficients)
    torch.testing.assert_close(other.streamed.mean, one.streamed.mean, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Stepwise(CrossEntropy):
    """Does what `kind` says with the number of its step."""

    kind: str

    def direction(self, grads, params, context):
        factor = {
            "first": lambda s: 0.5 if s == 0 else 1.0,
            "early": lambda s: 0.5 if s > 1 else 1.0,
            "warm": lambda s: 0.5 if s >= 8 else 1.0,
            "modulo": lambda s: 0.5 if s % 7 == 6 else 1.0,
            "index": lambda s: (1.0, 0.5)[s > 10],
            "text": lambda s: float(len(str(s))),
        }[self.kind](context.step)
        return {name: factor * grad for name, grad in grads.items()}, {}


@pytest.mark.parametrize("kind", ["first", "early", "warm", "modulo", "index", "text"])
def test_the_number_of_a_step_is_recorded_only_where_later_ones_are_alike(capture, kind):
    task = make_task(objective=Stepwise(kind), local_steps=12)
    if kind in ("warm", "modulo", "index", "text"):
        with pytest.raises(ValueError, match="depends on its number"):
            Captured(task)
        return
    job = make_job(task)
    one, _ = trained(Sequential(make_task(objective=Stepwise(kind), local_steps=12)), job)
    torch.testing.assert_close(trained(capture(task), job)[0], one, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Alternates(CrossEntropy):
    """Halves every second gradient; it knows which by what the last step left, not by its number."""

    def direction(self, grads, params, context):
        odd = "even" in context.step_state
        one = torch.ones((), dtype=torch.float64)
        return {n: grad / (2 if odd else 1) for n, grad in grads.items()}, {"odd": one} if odd else {"even": one}


def test_steps_that_alternate_for_ever_are_not_recorded():
    with pytest.raises(ValueError, match="depends on its number"):
        Captured(make_task(objective=Alternates(), local_steps=12))


@dataclass(frozen=True)
class Leaves(CrossEntropy):
    """Ends differently after one step, two steps and many, with a step state in another order each time."""

    def direction(self, grads, params, context):
        old = context.step_state
        one = torch.ones((), dtype=torch.float64)
        a, b = old.get("a", one) + 1, old.get("b", one) * 3
        return grads, ({"a": a, "b": b} if context.step % 2 == 0 else {"b": b, "a": a}) if context.step < 2 else {
            "b": b, "a": a}  # fmt: skip

    def finish(self, params, context):
        mask = torch.ones_like(context.step_state["a"].expand(3))
        mask = mask.clone()
        ones = torch.ones_like(mask)
        ones[0] = 0
        bonus = 7.0 if context.step == 0 else 0.0
        return {}, {"a": context.step_state["a"] + bonus, "b": context.step_state["b"], "o": ones * mask * 2}, None


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_rounds_of_any_length_end_as_they_do_alone(capture, steps):
    job = make_job(task := make_task(objective=Leaves(), local_steps=steps))
    _, left = trained(Sequential(make_task(objective=Leaves(), local_steps=steps)), job)
    _, also = trained(capture(task), job)
    for name in ("a", "b", "o"):
        torch.testing.assert_close(also.extras[name], left.extras[name])


@dataclass(frozen=True)
class Bakes(CrossEntropy):
    """Reads a value past the dispatcher, so that the recorder does not see it."""

    def loss(self, model, params, batch, context):
        scale = float(np.sqrt(np.asarray(context.num_samples)))
        return functional.cross_entropy(model(params, batch.x), batch.y) * scale, {}


def test_a_value_that_was_read_behind_the_recorders_back_is_found_out():
    with pytest.raises(ValueError, match="more than its inputs"):
        Captured(make_task(objective=Bakes()))


@dataclass(frozen=True)
class Branches(CrossEntropy):
    def direction(self, grads, params, context):
        return {name: grad if context.broadcast["q"] > 0.5 else -grad for name, grad in grads.items()}, {}


def test_what_the_rule_will_send_decides_beforehand_whether_a_step_can_be_recorded():
    task = replace(make_task(objective=Branches()), told={"q": 1.0})
    engine, _ = make_engine(task, "auto", cohort=12, threads=1)
    assert engine.plan.get("kernels") != "captured"
    engine.close()


@dataclass(frozen=True)
class Refuses(CrossEntropy):
    def direction(self, grads, params, context):
        return {name: grad / range(context.num_samples)[-1] for name, grad in grads.items()}, {}


def test_an_objective_that_refuses_to_be_recorded_is_trained_otherwise():
    engine, _ = make_engine(make_task(objective=Refuses()), "auto", cohort=1, threads=1)
    assert engine.plan["engine"] == "sequential"


@dataclass(frozen=True)
class Whole(CrossEntropy):
    def loss(self, model, params, batch, context):
        return functional.cross_entropy(model(params, batch.x), batch.y), {}


def test_batches_larger_than_all_data_are_whole(capture):
    job = make_job(task := make_task(objective=Whole(), batch_size=64))
    one, _ = trained(Sequential(make_task(objective=Whole(), batch_size=64)), job)
    torch.testing.assert_close(trained(capture(task), job)[0], one, rtol=0, atol=1e-12)


def test_an_alias_is_of_a_value_and_not_of_memory_that_moves():
    def function(given):
        a, b, c = given
        y = torch.ones_like(a) * a
        y.add_(1)  # not a
        view = b.view(-1)
        product = b @ b
        view.mul_(3)
        c.sub_(product)
        return [y.sum() + a.sum()]

    inputs = [torch.randn(3, dtype=torch.float64), *(torch.randn(4, 4, dtype=torch.float64) for _ in range(2))]
    program = record(function, [t.clone() for t in inputs])
    mine, theirs = [t.clone() for t in inputs], [t.clone() for t in inputs]
    torch.testing.assert_close(program(mine), function(theirs))
    torch.testing.assert_close(mine, theirs)


def test_a_run_knows_beforehand_what_its_rule_sends(tmp_path):
    result = simulate("strategy=scaffold", num_rounds=2, folder=tmp_path / "run")
    assert "captured" in str(result.summary["plan"]["engine_arguments"])


def test_nobody_computes_a_tensor_for_its_dtype_alone():
    def step(given):
        a, b, rate = given
        return [a.mm(b).new_ones(()) + rate, a.mm(b).new_zeros(3)]

    program = record(step, [torch.ones(3, 3).double(), torch.ones(3, 3).double(), torch.tensor(2.0).double()])
    given = [torch.zeros(3, 3).double(), torch.zeros(3, 3).double(), torch.tensor(5.0).double()]
    assert "mm" not in program.body
    assert [value.tolist() for value in program(given)] == [6.0, [0.0] * 3]


def sums(given):
    """A step along DᵀX + μ (W − R) − G, G an input."""
    weight, received, drift, d, x, rate, mu = given
    grad = d.t().mm(x) + (weight - received) * mu - drift
    weight.addcmul_(grad, rate, value=-1)
    return [d.sum()]


def written_between(given):
    """As `sums`, but what is in the sum moves before the step."""
    weight, received, drift, d, x, rate, mu = given
    grad = d.t().mm(x) + (weight - received) * mu - drift
    weight.add_(1.0)
    d.mul_(2.0)
    weight.addcmul_(grad, rate, value=-1)
    return [d.sum()]


def pulled_twice(given):
    """Two pulls, both of the weight as it was."""
    weight, received, drift, d, x, rate, mu = given
    weight.addcmul_((weight - received) * mu + (weight - drift) * mu, rate, value=-1)
    return [d.sum() + x.sum()]


def the_weight_itself(given):
    """A pull without a factor: the weight as it was is a term."""
    weight, received, drift, d, x, rate, mu = given
    weight.addcmul_(d.t().mm(x) + (weight - received) - drift, rate, value=-1)
    return [mu + 0]


def a_product_of_the_weight(given):
    """A pull, and a product that reads the weight before it moves."""
    weight, received, drift, d, x, rate, mu = given
    weight.addcmul_((weight - received) * mu + d.t().mm(d.mm(weight)), rate, value=-1)
    weight.addcmul_((weight - drift) * mu + weight[:, :2].mm(weight[:2]), rate, value=-1)
    return [x.sum()]


@pytest.mark.parametrize("function", [sums, written_between, pulled_twice, the_weight_itself, a_product_of_the_weight])
def test_a_step_along_a_sum_is_taken_term_by_term(function):
    def inputs():
        rng = torch.Generator().manual_seed(2)
        shapes = [(6, 5), (6, 5), (6, 5), (3, 6), (3, 5), (), ()]
        return [torch.rand(shape, generator=rng, dtype=torch.float64) for shape in shapes]

    program = record(function, inputs())
    mine, theirs = inputs(), inputs()
    left, wanted = program(mine), function(theirs)
    for a, b in zip([*left, *mine], [*wanted, *theirs], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    if function is sums:  # nothing of the weight's size is written beside the weight
        assert [name for name in ("lerp_", "addmm_", "addcmul_", "sub(", "mm(", "add(") if name in program.body] == [
            "lerp_", "addmm_", "addcmul_",
        ]  # fmt: skip


@dataclass(frozen=True)
class Remembers(CrossEntropy):
    """Keeps a sum over rounds, and sends what it was."""

    def finish(self, params, context):
        before = context.client_state["sum"]
        return {"sum": before + context.layout.join(params)}, {"before": before * 2}, None


def test_rows_without_a_step_keep_their_state_and_send_nothing(capture):
    task = replace(make_task(objective=Remembers()), partition=Partition(np.arange(30), np.array([0, 20, 20, 30])))
    D = task.shared.size
    task = replace(task, store=ClientStore(3, {"sum": torch.zeros(D, dtype=torch.float64)}))
    start = torch.randn(D, generator=RNG, dtype=torch.float64)
    state = torch.arange(3.0 * D, dtype=torch.float64).view(3, D)
    job = make_job(
        task,
        clients=np.arange(3),
        received=np.zeros(3, dtype=np.int64),
        models={0: start},
        state={"sum": state.clone()},
    )
    updates, block = trained(capture(task), job)
    assert torch.equal(job.state["sum"], state)  # whoever trains a row again finds what it began with
    torch.testing.assert_close(block.state["sum"][[0, 2]], (state + start + updates)[[0, 2]])
    torch.testing.assert_close(block.extras["before"][[0, 2]], 2 * state[[0, 2]])
    assert torch.equal(block.state["sum"][1], state[1])
    assert not block.extras["before"][1].any()
    assert not updates[1].any()
