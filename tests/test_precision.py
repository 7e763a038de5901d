"""bf16 rounds the forward's products and nothing else; what cannot be had is refused in one line."""

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.build import build
from fedsim.cli import main
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.moon import Moon
from fedsim.config import compose
from fedsim.contracts import Partition
from fedsim.engine import measured, precision
from fedsim.engine.auto import make_engine
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.char_gru import char_gru
from fedsim.models.cnn import cnn
from fedsim.models.mlp import mlp
from fedsim.models.resnet import resnet8

# bfloat16 keeps 8 significant bits, so a rounded number is off by 2⁻⁹ of itself at most. A step's gradient is a chain
# of such products: a shallow model's updates stay within 3 % (measured here: 0.3 to 0.6 %). In deeper ones roundings
# flip rectifiers, and over 48 random images that is seen (measured: 1 to 11 % in the CNN, 6 to 35 % in the ResNet).
ROUNDED = 0.03
DEEP = {"cnn": 0.2, "resnet8": 0.6}
TINY = ["data=blobs", "model=mlp", "partition.num_clients=6", "threads=1", "num_rounds=3", "precision=bf16"]
N = 48
MODELS = {
    "mlp": (lambda: mlp((8,), 5, hidden=(16,)), lambda g: torch.randn(N, 8, generator=g)),
    "cnn": (lambda: cnn((1, 12, 12), 5, channels=(3, 4), hidden=6), lambda g: torch.randn(N, 1, 12, 12, generator=g)),
    "resnet8": (lambda: resnet8((3, 8, 8), 5), lambda g: torch.randn(N, 3, 8, 8, generator=g)),
    "char_gru": (
        lambda: char_gru((6,), 5, embedding=3, hidden=4),
        lambda g: torch.randint(0, 5, (N, 6), generator=g),
    ),
}


def make_task(name="mlp", kind="bf16", objective=None, **training):
    make, inputs = MODELS[name]
    torch.manual_seed(1)
    module, generator = make(), torch.Generator().manual_seed(0)
    shared = Layout.of(dict(module.named_parameters()))
    objective = objective or CrossEntropy()
    first = objective.init_client(shared) if hasattr(objective, "init_client") else {}
    return Task(
        module=module,
        shared=shared,
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=objective,
        training=LocalTraining(**{"lr": 0.1, "batch_size": 4, **training}),
        x=inputs(generator),
        y=torch.randint(0, 5, (N,), generator=generator),
        partition=Partition(np.arange(N), np.array([0, 9, 20, 24, 48])),
        store=ClientStore(4, first),
        precision=kind,
    )


def updates(engine, weights):
    clients = np.arange(4)
    job = Job(
        clients=clients,
        received=np.zeros(4, dtype=np.int64),
        models={0: weights},
        broadcasts={},
        buffers=torch.zeros(0),
        state=engine.task.store.get(clients, torch.device("cpu")),
        round=1,
        key=1,
        lr=engine.task.training.lr,
    )
    cohort, _ = Trainer(engine).collect(job)
    engine.close()
    return cohort.rows.clone(), cohort.extras["train_loss"]


def start(task):
    return torch.cat([p.detach().flatten().clone() for p in task.module.parameters()])


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_a_forward_rounds_its_operands_by_hand():
    task = make_task()
    one, _, two = (layer for layer in task.module.modules() if isinstance(layer, nn.Linear | nn.ReLU))
    r = torch.Tensor.bfloat16
    hidden = (r(task.x) @ r(one.weight).T + r(one.bias)).relu()
    by_hand = (hidden @ r(two.weight).T + r(two.bias)).float()
    logits = precision.forward(task)(task.x)
    assert logits.dtype == torch.float32
    # twice: the result of a product is itself rounded to 2⁻⁹, before or after the bias is added
    torch.testing.assert_close(logits, by_hand, rtol=2**-7, atol=2**-7)
    assert not torch.equal(logits, task.module(task.x))


def test_fp32_runs_the_module_itself():
    task = make_task(kind="fp32")
    assert precision.forward(task) is task.module


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [Sequential, lambda task: Vectorized(task, chunk=3, threads=2)])
def test_a_round_is_the_float32_round_but_for_rounding(name, kind):
    weights = start(make_task(name))
    exact, losses = updates(Sequential(make_task(name, "fp32", lr=0.02)), weights)
    rounded, near = updates(kind(make_task(name, lr=0.02)), weights)
    assert rounded.dtype == torch.float32
    for a, b in zip(rounded, exact, strict=True):
        assert 1e-5 < distance(a, b) < DEEP.get(name, ROUNDED)  # rounded, and no more
    torch.testing.assert_close(near, losses, rtol=ROUNDED, atol=0)


@pytest.mark.parametrize("training", [{"momentum": 0.9}, {"optimizer": "adamw", "lr": 0.003}, {"clip_norm": 0.5}])
def test_every_optimiser_steps_in_float32(training):
    weights = start(make_task())
    exact, _ = updates(Sequential(make_task(kind="fp32", **training)), weights)
    one, _ = updates(Sequential(make_task(**training)), weights)
    many, _ = updates(Vectorized(make_task(**training)), weights)
    # AdamW divides by the gradient's size, so that small ones' rounding counts whole
    bound = 5 * ROUNDED if "optimizer" in training else ROUNDED
    assert distance(one, exact) < bound
    assert distance(many, exact) < bound


def test_weights_that_moved_are_read_anew_in_every_step():
    # Were rounded weights kept over steps, a client would take 40 steps along its first gradient.
    weights = start(make_task())
    exact, _ = updates(Sequential(make_task(kind="fp32", local_steps=40, lr=0.5)), weights)
    for kind in (Sequential, Vectorized):
        rounded, _ = updates(kind(make_task(local_steps=40, lr=0.5)), weights)
        assert distance(rounded, exact) < 3 * ROUNDED  # 40 large steps add up


def test_a_loss_of_its_own_sees_float32():
    seen = []

    class Spy(Moon):
        def loss(self, model, params, batch, context):
            seen.append((model(params, batch.x).dtype, model.features(params, batch.x).dtype))
            return super().loss(model, params, batch, context)

    updates(Sequential(make_task(objective=Spy())), start(make_task()))
    assert set(seen) == {(torch.float32, torch.float32)}


def test_steps_smaller_than_bfloat16_tells_apart_add_up():
    # 1 + 2⁻¹⁰ is 1 in bfloat16: weights kept there would never move.
    moved, _ = updates(Sequential(make_task(lr=2**-12)), start(make_task()))
    assert (moved != 0).float().mean() > 0.9


def test_runs_repeat_to_the_bit_and_learn_as_float32_does(tmp_path):
    def run(name, *words):
        return fedsim.simulate(*TINY[:-1], *words, folder=tmp_path / name)

    one, two = run("one", "precision=bf16"), run("two", "precision=bf16")
    exact = run("exact")
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "one/rounds.jsonl").read_bytes() == (tmp_path / "two/rounds.jsonl").read_bytes()
    assert one.summary["loss"] != exact.summary["loss"]
    assert one.summary["loss"] == pytest.approx(exact.summary["loss"], rel=ROUNDED)
    assert one.summary["plan"]["precision"] == "bf16"


def test_auto_takes_no_kernel_that_computes_in_float32():
    engine, _ = make_engine(make_task(), "auto", cohort=4, threads=1)
    assert engine.plan.get("kernels", "generic") == "generic"
    engine.close()
    with pytest.raises(UserError, match="kernels=fused compute in float32; precision=bf16 is for kernels=generic"):
        make_engine(make_task(), "vectorized", cohort=4, threads=1, kernels="fused")


def test_the_users_row_is_of_a_precision():
    assert measured.situation(make_task(), 4, 1) != measured.situation(make_task(kind="fp32"), 4, 1)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["precision=tf32", "device=cpu"], "precision=tf32 is a mode of CUDA's products, and device is cpu"),
        (["precision=bf16", "dtype=float64"], "precision=bf16 is for dtype=float32, got dtype=float64"),
        (["precision=tf32", "dtype=float64"], "precision=tf32 is for dtype=float32"),
        (["precision=fp16"], "precision"),
    ],
)
def test_what_cannot_be_had_is_one_line(words, part, capsys):
    assert main(["run", *TINY[:-1], *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize(
    ("device", "kind", "allowed"),
    [
        ("cuda", "tf32", True),
        ("cuda", "bf16", True),
        ("cpu", "bf16", True),
        ("mps", "bf16", False),
        ("mps", "fp32", True),
    ],
)
def test_devices(device, kind, allowed):
    assert (precision.refusal(kind, torch.device(device), torch.float32) is None) == allowed


@pytest.mark.parametrize("native", [True, False])
def test_who_computes_in_software_is_told_once(native, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert precision.emulated("fp32", torch.device("cpu")) is None
    assert main(["run", *TINY, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    told = "warning: this CPU computes precision=bf16 in software, several times slower than precision=fp32\n"
    assert capsys.readouterr().err.count(told) == (not native)


@pytest.mark.parametrize("kind", precision.PRECISIONS)
def test_tf32_is_a_switch_of_cuda(kind):
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        precision.set_tf32(kind)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (kind == "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def test_the_plan_line_says_it(capsys, tmp_path):
    assert main(["run", *TINY, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert "float32 with bf16 products" in capsys.readouterr().out


def test_build_hands_it_to_the_task():
    experiment = build(compose(TINY))
    experiment.engine.close()
    assert experiment.task.precision == "bf16"
    assert experiment.plan["precision"] == "bf16"
