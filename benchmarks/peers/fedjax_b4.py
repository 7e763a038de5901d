"""B4 in FedJAX 0.0.17: its FedAvg, one client after another in compiled steps."""

from __future__ import annotations

import sys

import jax

jax.tree_map = jax.tree_util.tree_map  # gone from JAX since 0.4.26; FedJAX still asks for it

import fedjax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import protocol  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402

work = protocol.load(sys.argv[1])
order = work["order"]  # (K, steps, batch)
start = tuple(jnp.asarray(part) for part in protocol.split(work))  # W1 (200, 784), b1, W2 (10, 200), b2


def loss(params, batch, rng):
    """Return the mean cross-entropy of a batch."""
    w1, b1, w2, b2 = params
    logits = jax.nn.relu(batch["x"] @ w1.T + b1) @ w2.T + b2  # (b, C)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1))


algorithm = fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(float(work["lr"])),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=order.shape[2], num_epochs=1, skip_shuffle=True),
)
key = jax.random.PRNGKey(0)
clients = [
    (b"%d" % k, fedjax.ClientDataset({"x": work["x"][mine.ravel()], "y": work["y"][mine.ravel()]}), key)
    for k, mine in enumerate(order)
]


def one_round() -> np.ndarray:
    """Do one round from the start weights."""
    state, _ = algorithm.apply(algorithm.init(start), clients)
    after = jax.block_until_ready(state.params)
    return np.concatenate([np.asarray(b - a).ravel() for a, b in zip(start, after, strict=True)])


one_round()  # compiles
protocol.serve(one_round, "fedjax", "jax")
