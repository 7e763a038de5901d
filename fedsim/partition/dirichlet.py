r"""Label skew by Dirichlet draws, in the two ways that papers mean and often confuse.

`per_class` (Yurochkin et al., ICML 2019; Li et al., ICDE 2022): every class is shared out over the clients,

.. math:: P_c \sim \mathrm{Dir}(\alpha 1_K), \qquad n_{kc} = \mathrm{round}(n_c P_{ck}),

so that sizes are skewed too. `per_client` (Hsu et al., 2019, arXiv:1909.06335; FedDyn, ICLR 2021): every client has
its own label distribution and a size that is fixed beforehand,

.. math:: q_k \sim \mathrm{Dir}(\alpha 1_C), \qquad y \sim q_k \text{ without replacement, } n_k \text{ times.}

Hsu et al. write Dir(α p) with p a probability vector, a C times smaller concentration than FedDyn's and FedLab's
Dir(α 1): `alpha_scale="total"` is theirs.

Departs from the references: shares are rounded by largest remainders, not by `int(cumsum)`, which favours late
clients; too small clients are mended by `repair`, not by drawing again until it fits. With `per_client` all clients'
first choices come before anybody's second, so that they stay a little nearer to q_k than if drawn one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Partition
from fedsim.partition.csr import check_enough, check_fraction, check_integer, check_labels, check_positive, from_counts
from fedsim.partition.repair import repair
from fedsim.partition.rounding import largest_remainder

Int = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Clients with Dirichlet label skew.

    Args:
        num_clients: K ≥ 1.
        alpha: concentration in [1e-6, 1e9]; 0.1 is strong skew, 100 is near iid.
        mode: "per_class" or "per_client", see above.
        alpha_scale: "component": Dir(α·1). "total": Dir(α·p), p uniform over clients (per_class), or the class
            frequencies (per_client).
        size_sigma: σ ≥ 0 of log-normal client sizes; 0 is equal sizes. `per_client` only.
        min_size: least samples a client; 0 allows empty clients.

    Raises:
        ValueError: an argument is out of range; when called, min_size · K exceeds the number of samples.

    """

    num_clients: int
    alpha: float
    mode: Literal["per_class", "per_client"] = "per_class"
    alpha_scale: Literal["component", "total"] = "component"
    size_sigma: float = 0.0
    min_size: int = 1

    def __post_init__(self) -> None:
        check_integer("num_clients", self.num_clients, 1)
        check_positive("alpha", self.alpha, "0.1 is strong skew, 100 is near iid")
        # Outside, Gamma draws under- and overflow to 0/0; inside, the limits are reached for any practical N.
        if not 1e-6 <= self.alpha <= 1e9:
            raise ValueError(f"alpha must be in [1e-6, 1e9], got {self.alpha!r}")
        if self.mode not in ("per_class", "per_client"):
            raise ValueError(f"mode must be per_class or per_client, got {self.mode!r}")
        if self.alpha_scale not in ("component", "total"):
            raise ValueError(f"alpha_scale must be component or total, got {self.alpha_scale!r}")
        check_fraction("size_sigma", self.size_sigma, 10.0)
        if self.size_sigma > 0 and self.mode == "per_class":
            raise ValueError("size_sigma needs mode=per_client; with per_class the sizes follow from the class shares")
        check_integer("min_size", self.min_size, 0)

    def __call__(self, labels: Int, rng: np.random.Generator, natural: Int | None = None) -> Partition:
        """Return a partition of range(N) by labels (N,)."""
        labels = check_labels(labels)
        check_enough(len(labels), self.num_clients, self.min_size)
        totals = np.bincount(labels)  # (C,)
        counts = self._per_class(totals, rng) if self.mode == "per_class" else self._per_client(totals, rng)  # (K, C)
        return from_counts(labels, repair(counts, self.min_size), rng)

    def _per_class(self, totals: Int, rng: np.random.Generator) -> Int:
        component = self.alpha / (self.num_clients if self.alpha_scale == "total" else 1)
        shares = rng.dirichlet(np.full(self.num_clients, component), size=len(totals))  # (C, K)
        return largest_remainder(totals, shares).T  # (K, C)

    def _per_client(self, totals: Int, rng: np.random.Generator) -> Int:
        """Draw all clients' samples together, again and again until every client is full.

        A pass that asks for more of a class than there is deals what there is to a random subset of the askers and
        exhausts the class; those left out draw again without it. So C passes are enough.
        """
        num_clients, num_classes = self.num_clients, len(totals)
        present = np.flatnonzero(totals)  # (C',)
        prior = totals[present] / totals.sum()  # (C',)
        concentration = self.alpha * (prior if self.alpha_scale == "total" else np.ones(len(present)))  # (C',)
        q = np.zeros((num_clients, num_classes))  # (K, C)
        q[:, present] = rng.dirichlet(concentration, size=num_clients)
        spread = np.exp(self.size_sigma * rng.standard_normal(num_clients))  # (K,)
        need = largest_remainder([totals.sum()], spread[None])[0]  # (K,)
        supply = totals.copy()  # (C,)
        counts = np.zeros((num_clients, num_classes), dtype=np.int64)  # (K, C)
        for _ in range(num_classes + 1):
            p = q * (supply > 0)  # (K, C)
            p[p.sum(axis=1) <= 0] = supply  # all classes that this client wants are gone: what is left is as good
            drawn = rng.multinomial(need, p / p.sum(axis=1, keepdims=True))  # (K, C)
            for c in np.flatnonzero(drawn.sum(axis=0) > supply):
                drawn[:, c] = rng.multivariate_hypergeometric(drawn[:, c], supply[c], method="marginals")
            counts += drawn
            supply -= drawn.sum(axis=0)
            need = need - drawn.sum(axis=1)
            if not need.any():
                break
        return counts
