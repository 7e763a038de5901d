"""Gaussian blobs: tiny data of any shape, with clients and domains if asked, for tests, demos and scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.contracts import Dataset
from fedsim.data.holdout import check_fraction
from fedsim.rng import generator


def blobs(  # noqa: PLR0913  one argument a key of the config
    *,
    num_samples: int = 1000,
    shape: Sequence[int] = (10,),
    num_classes: int = 5,
    num_clients: int | None = None,
    num_domains: int | None = None,
    spread: float = 1.0,
    domain_shift: float = 1.0,
    test_fraction: float = 0.2,
    data_seed: int = 0,
) -> Dataset:
    """Draw x = m_y + d_domain + N(0, I), with m_c ~ N(0, spread² I) and d ~ N(0, domain_shift² I).

    Classes come in equal numbers; clients and domains are drawn uniformly, a client lies in one domain.

    Args:
        num_samples: N ≥ num_classes, training and test together.
        shape: of one sample, e.g. [10] or [3, 32, 32].
        num_classes: C ≥ 2.
        num_clients: natural clients; null: none.
        num_domains: null: none.
        spread: standard deviation of the class centres, in units of the noise; ≥ 0.
        domain_shift: standard deviation of the domains' offsets; ≥ 0.
        test_fraction: 0 < test_fraction < 1; the last samples.
        data_seed: of the draw. It is not the run's seed: all runs share one data set.

    Returns:
        x (N, *shape) float32, y (N,).

    Raises:
        ValueError: an argument is out of its range.

    """
    check_fraction("test_fraction", test_fraction)
    if num_classes < 2 or num_samples < 2 * num_classes:
        raise ValueError(f"blobs needs num_samples ≥ 2 · num_classes ≥ 4, got {num_samples} and {num_classes}")
    for name, value in (("num_clients", num_clients), ("num_domains", num_domains)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be ≥ 1 or null, got {value}")
    if spread < 0 or domain_shift < 0 or min(shape, default=0) < 1:
        raise ValueError(f"spread, domain_shift ≥ 0 and shape ≥ 1 are needed, got {spread}, {domain_shift}, {shape}")
    rng = generator(data_seed, "blobs")
    shape = tuple(shape)
    centres = rng.normal(0, spread, (num_classes, *shape)).astype(np.float32)  # (C, *shape)
    y = rng.permutation(np.arange(num_samples, dtype=np.int64) % num_classes)  # (N,)
    x = rng.standard_normal((num_samples, *shape), dtype=np.float32)  # (N, *shape)
    x += centres[y]
    client = None if num_clients is None else rng.integers(num_clients, size=num_samples)  # (N,)
    domain = None
    if num_domains is not None:
        domain = rng.integers(num_domains, size=num_samples) if client is None else client % num_domains  # (N,)
        x += rng.normal(0, domain_shift, (num_domains, *shape)).astype(np.float32)[domain]
    num_test = max(1, round(test_fraction * num_samples))
    positions = np.arange(num_samples, dtype=np.int64)
    return Dataset(
        x=torch.from_numpy(x),
        y=torch.from_numpy(y),
        splits={"train": positions[: num_samples - num_test], "test": positions[num_samples - num_test :]},
        num_classes=num_classes,
        client=client,
        domain=domain,
    )
