r"""Synthetic(α, β): logistic models that differ between clients by α, and their inputs by β.

Li et al., MLSys 2020 (FedProx), sec. 5.1 and app. C.1. https://arxiv.org/abs/1812.06127
    y = argmax(W_k^T x + b_k),   W_k, b_k ~ N(u_k, 1),   u_k ~ N(0, α)
    x ~ N(v_k, Σ),   Σ_jj = j^{-1.2},   v_k ~ N(B_k, 1),   B_k ~ N(0, β)
The paper leaves open what the second argument of N(0, α) is; its released code takes α and β as standard
deviations, and so does this. Sizes are the code's: ⌊log-normal(4, 2)⌋ + 50 samples a client.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedsim.contracts import Dataset
from fedsim.data.holdout import stratified_holdout
from fedsim.rng import generator

Float64 = npt.NDArray[np.float64]


def synthetic(  # noqa: PLR0913  one argument a key of the config
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    num_clients: int = 30,
    num_features: int = 60,
    num_classes: int = 10,
    min_size: int = 50,
    test_fraction: float = 0.1,
    data_seed: int = 0,
) -> Dataset:
    """Draw the natural clients of Synthetic(α, β).

    Client k's model, inputs and size are functions of (data_seed, k): more clients leave the first ones as
    they were.

    Args:
        alpha: standard deviation of the clients' model means u_k; ≥ 0.
        beta: standard deviation of the clients' input means B_k; ≥ 0.
        iid: one model W, b ~ N(0, 1) for all and v_k = 0; alpha and beta are not used.
        num_clients: K ≥ 1.
        num_features: 60 in the paper; ≥ 1.
        num_classes: C, 10 in the paper; ≥ 2.
        min_size: added to each client's log-normal size; ≥ 2.
        test_fraction: of each client's samples; 0 < test_fraction < 1; 0.1 in the released code.
        data_seed: of the draw. It is not the run's seed: all runs share one data set.

    Returns:
        x (N, num_features) float32, y (N,), client (N,).

    Raises:
        ValueError: an argument is out of its range.

    """
    for name, value, least in (("alpha", alpha, 0), ("beta", beta, 0), ("num_clients", num_clients, 1)):
        if value < least:
            raise ValueError(f"{name} must be ≥ {least}, got {value}")
    for name, value, least in (
        ("num_features", num_features, 1),
        ("num_classes", num_classes, 2),
        ("min_size", min_size, 2),
    ):
        if value < least:
            raise ValueError(f"{name} must be ≥ {least}, got {value}")
    deviation = np.arange(1, num_features + 1) ** -0.6  # (F,) √Σ_jj
    shared = generator(data_seed, "synthetic model").standard_normal((num_features + 1, num_classes))  # (F+1, C)
    inputs, labels = [], []
    for k in range(num_clients):
        rng = generator(data_seed, "synthetic client", k)
        size = min_size + int(rng.lognormal(4, 2))
        u, b = rng.normal(0, alpha), rng.normal(0, beta)
        model = shared if iid else rng.normal(u, 1, (num_features + 1, num_classes))  # (F+1, C)
        mean = np.zeros(num_features) if iid else rng.normal(b, 1, num_features)  # (F,)
        x = (mean + deviation * rng.standard_normal((size, num_features))).astype(np.float32)  # (n, F)
        inputs.append(x)
        labels.append(_label(x, model))
    client = np.repeat(np.arange(num_clients, dtype=np.int64), [len(y) for y in labels])  # (N,)
    y = np.concatenate(labels)  # (N,)
    return Dataset(
        x=torch.from_numpy(np.concatenate(inputs)),
        y=torch.from_numpy(y),
        splits=stratified_holdout(client, y, fraction=test_fraction, seed=data_seed),
        num_classes=num_classes,
        client=client,
    )


def _label(x: npt.NDArray[np.float32], model: Float64) -> npt.NDArray[np.int64]:
    # The last row of the model is b. A softmax does not move the argmax.
    labels: npt.NDArray[np.int64] = (x @ model[:-1] + model[-1]).argmax(1)  # (n,)
    return labels
