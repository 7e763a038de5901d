r"""FedBN: normalisation layers stay with each client, statistics and all; the rest is averaged.

Li et al., ICLR 2021, Algorithm 1. https://arxiv.org/abs/2102.07623
    w_l ← \sum_k (n_k / n) w_{l,k} for each layer l that is not a batch normalisation
Departs from the paper: group and layer normalisations, which it does not speak of, count as normalisations, so that
models without batch norm have something to keep; clients are weighted by samples, the paper's Algorithm 1 by 1/K.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedsim.contracts import LinearRule

NORMALISATIONS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm,
)  # fmt: skip


@dataclass(frozen=True)
class FedBN(LinearRule):
    """FedAvg of all but the normalisation layers.

    Attributes:
        local_buffers: running statistics stay with their client too.

    """

    local_buffers: ClassVar[bool] = True

    def local_parameters(self, model: nn.Module) -> list[str]:
        """Return patterns of the parameters of a model's normalisation layers.

        Raises:
            ValueError: it has none.

        """
        names = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            if isinstance(module, NORMALISATIONS)
            for name, _ in module.named_parameters(recurse=False)
        ]
        if not names:
            raise ValueError(
                "FedBN needs a model with normalisation layers; choose model=mlp_bn or a model of your own"
            )
        return [f"^{re.escape(name)}$" for name in names]
