"""Next-character prediction by a gated recurrent unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedsim.models.classifier import Classifier, check_at_least


class GRU(nn.Module):
    r"""One layer of `nn.GRU(batch_first=True)`, written through its products so that clients can be batched.

    Cho et al. (EMNLP 2014), with the reset gate after the product, as in cuDNN and `nn.GRU`:
        r, z, n = \sigma(i_r + h_r), \sigma(i_z + h_z), tanh(i_n + r * h_n),   h \leftarrow (1 - z) * n + z * h
    where i = input(x_t) and h_· = hidden(h). `input` and `hidden` hold nn.GRU's weight_ih_l0, bias_ih_l0 and
    weight_hh_l0, bias_hh_l0, gates in the same order r, z, n, and start as they do: uniform in ±1/√H.
    """

    def __init__(self, num_inputs: int, hidden: int) -> None:
        """Build a layer from (B, T, num_inputs) to states (B, T, hidden)."""
        super().__init__()
        self.input = nn.Linear(num_inputs, 3 * hidden)
        self.hidden = nn.Linear(hidden, 3 * hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of all steps, (B, T, H), from x (B, T, E); the state before the first is 0."""
        size = self.hidden.in_features
        i_rz, i_n = self.input(x).split((2 * size, size), dim=-1)  # (B, T, 2H), (B, T, H)
        h = torch.zeros_like(i_n[:, 0])  # (B, H)
        states = []
        # Unbound once: the gradient of a slice is as large as the sequence, and T slices would cost O(T²).
        for rz_t, n_t in zip(i_rz.unbind(1), i_n.unbind(1), strict=True):
            h_rz, h_n = self.hidden(h).split((2 * size, size), dim=-1)  # (B, 2H), (B, H)
            r, z = torch.sigmoid(rz_t + h_rz).chunk(2, dim=-1)  # (B, H) each
            n = torch.tanh(torch.addcmul(n_t, r, h_n))  # (B, H)
            h = torch.lerp(n, h, z)  # (B, H)
            states.append(h)
        return torch.stack(states, dim=1)  # (B, T, H)


class Last(nn.Module):
    """The last state of a sequence."""

    def forward(self, states: Tensor) -> Tensor:
        """Return (B, H) from (B, T, H)."""
        return states[:, -1]  # (B, H)


def char_gru(
    input_shape: tuple[int, ...],
    num_classes: int,
    embedding: int = 8,
    hidden: int = 128,
    num_layers: int = 1,
    vocabulary: int | None = None,
) -> Classifier:
    """Return embedding – GRU layers – last state, whose head gives the logits of the next token.

    The federated task of McMahan et al. (AISTATS 2017, §3: 8-dimensional embedding, 2 layers of 256 units), with GRU
    cells in place of LSTM.

    Args:
        input_shape: (T,), T tokens a sample, T ≥ 1.
        num_classes: C ≥ 2.
        embedding: width ≥ 1 of a token's embedding.
        hidden: units ≥ 1 of each layer.
        num_layers: ≥ 1.
        vocabulary: number of tokens; None: num_classes, as when the next token is predicted.

    """
    if len(input_shape) != 1:
        raise ValueError(
            f"char_gru reads tokens (T,), got input_shape={tuple(input_shape)}; choose text data, or model=mlp"
        )
    vocabulary = num_classes if vocabulary is None else vocabulary
    check_at_least(1, embedding=embedding, hidden=hidden, num_layers=num_layers, vocabulary=vocabulary)
    body: dict[str, nn.Module] = {"embedding": nn.Embedding(vocabulary, embedding)}
    for i in range(num_layers):
        body[f"gru{i + 1}"] = GRU(hidden if i else embedding, hidden)
    return Classifier(body | {"last": Last()}, hidden, num_classes)
