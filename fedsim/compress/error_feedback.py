r"""Error feedback: what compression loses is kept by the client and added to its next update.

Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, Algorithm 2. https://arxiv.org/abs/1901.09847
    p_k = Δ_k + e_k,   sent: C(p_k),   e_k ← p_k − C(p_k)
On updates in place of gradients times rate. A client that does not take part keeps its e_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.compress.contract import Compressor, Senders, contraction
from fedsim.contracts import State
from fedsim.layout import Layout

ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """A compressor with memory of what it lost.

    Args:
        compressor: C, a contraction without memory of its own.

    """

    compressor: Compressor

    def init_client(self, layout: Layout) -> dict[str, Tensor]:
        """Return e = 0 (D,).

        Raises:
            ValueError: the compressor is no contraction, so that errors would grow without bound.

        """
        need_contraction("error_feedback", self.compressor, layout.size)
        return {ERROR: torch.zeros(layout.size)}

    def __call__(self, rows: Tensor, senders: Senders, state: State) -> tuple[Tensor, State]:
        """Return C(p) (K, D) and p − C(p)."""
        wanted = rows + state[ERROR].to(rows)  # (K, D)
        sent, _ = self.compressor(wanted, senders, {})
        return sent, {ERROR: wanted - sent}

    def num_bytes(self, size: int, itemsize: int) -> int:
        """Return the compressor's."""
        return self.compressor.num_bytes(size, itemsize)


def need_contraction(name: str, compressor: Compressor, size: int) -> None:
    """Refuse a compressor that is no contraction.

    Raises:
        ValueError: it is none.

    """
    if contraction(compressor, size) is None:
        raise ValueError(
            f"compressor={name} needs a contraction, and {type(compressor).__name__} is none as it is set; "
            "use top_k, random_k with unbiased=false, or qsgd with more levels or smaller buckets"
        )
