"""Objectives that change the gradient run on fused kernels, and what they keep between steps stays theirs."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.fedhyper import FedHyper
from fedsim.contracts import Partition
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.layout import Layout
from fedsim.linalg import dot
from fedsim.local import LocalTraining
from fedsim.models.mlp import mlp
from fedsim.models.parameters import initialise

SIZES = np.array([9, 20, 13, 4])  # steps of 5, 10, 7 and 2: prefixes shrink
TRAININGS = {
    "sgd": LocalTraining(lr=0.2, batch_size=4, local_epochs=2),
    "decay": LocalTraining(lr=0.2, batch_size=4, local_epochs=2, weight_decay=0.1),
    "momentum": LocalTraining(lr=0.1, batch_size=4, local_epochs=2, momentum=0.9, weight_decay=0.1),
    "adamw": LocalTraining(optimizer="adamw", lr=0.01, batch_size=4, local_epochs=2, weight_decay=0.1),
    "clipped": LocalTraining(lr=0.1, batch_size=4, local_epochs=2, clip_norm=0.05),
}


@dataclass(frozen=True, kw_only=True)
class Remembering(CrossEntropy):
    """Keeps the two last gradients and the last parameters themselves, no copies, and steps along all of them."""

    def direction(self, grads, params, context):
        past = context.step_state
        turned = {
            name: 0.4 * past.get(f"before.{name}", grad) + 0.2 * past.get(f"at.{name}", params[name])
            for name, grad in grads.items()
        }
        turned["head.bias"] = grads["head.bias"]  # as it came
        state = {f"last.{name}": grad for name, grad in grads.items()}
        state |= {f"before.{name}": past.get(f"last.{name}", grad) for name, grad in grads.items()}
        state |= {f"at.{name}": params[name] for name in grads}
        return turned, state


def trained(engine, objective, training, broadcast, **how):
    module = initialise(lambda: mlp((8,), 5, hidden=(6,)), 0).double()
    count, layout = int(SIZES.sum()), Layout.of(dict(module.named_parameters()))
    rng = torch.Generator().manual_seed(0)
    start = layout.join({name: p.detach().clone() for name, p in module.named_parameters()})
    task = Task(
        module=module, shared=layout, local=Layout((), ()), buffers=Layout((), ()), objective=objective,
        training=training, x=torch.randn(count, 8, generator=rng, dtype=torch.float64),
        y=torch.randint(0, 5, (count,), generator=rng),
        partition=Partition(np.arange(count), np.concatenate([[0], np.cumsum(SIZES)])), store=ClientStore(4, {}),
    )  # fmt: skip
    job = Job(
        clients=np.arange(4), received=np.zeros(4, dtype=np.int64), models={0: start}, broadcasts={0: broadcast},
        buffers=start.new_zeros(0), state={}, round=1, key=1, lr=training.lr,
    )  # fmt: skip
    made, out = engine(task, **how), start.new_empty(4, layout.size)
    block = made.train(job, out)
    made.close()
    return out, block.extras, made.plan


def sent(objective):
    size = sum(p.numel() for p in mlp((8,), 5, hidden=(6,)).parameters())
    if isinstance(objective, FedHyper):
        previous = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {"previous": previous, "num_participants": 3.0}
    return {}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("kernels", ["fused", "generic"])
@pytest.mark.parametrize(
    "objective", [Remembering(), FedHyper(kappa=0.1), FedHyper(kappa=0.1, preset="reference", normalize="cosine")],
    ids=["remembering", "hyper", "reference"],
)  # fmt: skip
def test_directions_on_batched_kernels_are_the_loops(objective, kernels, training):
    expected, extras, _ = trained(Sequential, objective, training, sent(objective))
    found, seen, plan = trained(Vectorized, objective, training, sent(objective), kernels=kernels, chunk=3)
    assert plan["kernels"] == kernels
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)  # float64, another order of sums
    assert extras.keys() == seen.keys()
    for name, value in extras.items():
        torch.testing.assert_close(seen[name].double(), value.double(), rtol=1e-6, atol=1e-9)


def test_what_is_kept_is_the_steps_own():
    """Against the same objective with copies of all that it keeps."""

    class Copying(Remembering):
        def direction(self, grads, params, context):
            own = {n: g.clone() for n, g in grads.items()}
            turned, state = super().direction(own, {n: p.clone() for n, p in params.items()}, context)
            return turned, {name: value.clone() for name, value in state.items()}

    for engine, how in ((Sequential, {}), (Vectorized, {"kernels": "fused", "chunk": 3})):
        for training in TRAININGS.values():
            found, _, _ = trained(engine, Remembering(), training, {}, **how)
            expected, _, _ = trained(engine, Copying(), training, {}, **how)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_dot_is_the_same_alone_and_batched_and_has_a_gradient():
    rng = torch.Generator().manual_seed(2)
    a, b = (torch.randn(5, 3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    expected = (a * b).sum((1, 2))
    torch.testing.assert_close(torch.stack([dot(x, y) for x, y in zip(a, b, strict=True)]), expected)
    torch.testing.assert_close(torch.func.vmap(dot)(a, b), expected)
    torch.testing.assert_close(torch.func.vmap(dot, in_dims=(1, 1))(a.movedim(0, 1), b.movedim(0, 1)), expected)
    torch.testing.assert_close(torch.func.vmap(dot, in_dims=(0, None))(a, b[0]), (a * b[0]).sum((1, 2)))
    torch.testing.assert_close(torch.func.vmap(dot, in_dims=(None, 0))(a[0], b), (a[0] * b).sum((1, 2)))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(dot))(a, b), b)
