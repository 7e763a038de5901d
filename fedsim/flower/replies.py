"""Replies of real clients, read into a cohort."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.contracts import Cohort
from fedsim.errors import ClientError as ClientError
from fedsim.flower.records import BROADCAST, NUM_EXAMPLES, flatten
from fedsim.layout import Layout

OnClientError = Literal["raise", "drop"]

_log = logging.getLogger(__name__)

EXTRAS = "extras"  # the record of an objective's second uploads
NUM_STEPS = "num-steps"
CLIENT = "client"  # the id that a node says it has, its "partition-id"


def checked(replies: Iterable[Message], on_client_error: OnClientError) -> list[Message]:
    """Return the replies that carry content, in order of their nodes; a failure that is dropped is logged.

    Raises:
        ClientError: a client failed and `on_client_error` is "raise".

    """
    kept = []
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        if reply.has_content():
            kept.append(reply)
            continue
        reason = (reply.error.reason or f"error code {reply.error.code}").strip()
        failure = f"node {reply.metadata.src_node_id} failed: {reason.splitlines()[-1]}"
        if on_client_error == "raise":
            error = ClientError(failure)
            error.add_note(reason)
            raise error
        _log.warning("%s; it is left out", failure)
    return kept


def only(content: RecordDict, kind: type[ArrayRecord] | type[MetricRecord]) -> Any:
    """Return the one record of a kind that a message carries, beside what fedsim itself adds."""
    found = [r for name, r in content.items() if isinstance(r, kind) and name not in (BROADCAST, EXTRAS)]
    if len(found) != 1:
        raise ValueError(f"a message must carry exactly one {kind.__name__}, got {len(found)}")
    return found[0]


def config_of(content: RecordDict) -> dict[str, Any]:
    """Return all that a message's `ConfigRecord`s say."""
    records = [record for record in content.values() if isinstance(record, ConfigRecord)]
    return {name: value for record in records for name, value in record.items()}


def read_replies(
    replies: Sequence[Message], *, clients: Sequence[int], layout: Layout, start: Tensor, round: int, seed: int = 0
) -> Cohort:
    """Return real replies as a cohort, rows in ascending order of client.

    Args:
        replies: one or more replies with content: one `ArrayRecord` of weights, one `MetricRecord` with
            "num-examples" and, for rules that ask how far a client went, "num-steps" (1 where absent).
        clients: the client of each reply.
        layout: of the model that was sent.
        start: (D,) what was sent, or (K, D) one row a reply.
        round: the round they answer.
        seed: the run's.

    """
    order = np.argsort(np.asarray(clients, dtype=np.int64), kind="stable")
    replies = [replies[i] for i in order]
    if start.dim() == 2:
        start = start[torch.from_numpy(order)]  # (K, D)
    rows = torch.stack([flatten(only(reply.content, ArrayRecord), layout, start) for reply in replies])  # (K, D)
    metrics: list[Mapping[str, Any]] = [only(reply.content, MetricRecord) for reply in replies]
    if any(NUM_EXAMPLES not in m for m in metrics):
        raise ValueError(f"every reply's MetricRecord must have {NUM_EXAMPLES!r}, got {sorted(metrics[0])}")
    steps = start.new_tensor([m.get(NUM_STEPS, 1) for m in metrics], dtype=torch.int64)
    return Cohort(
        updates=rows - start,
        weights=start.new_tensor([float(m[NUM_EXAMPLES]) for m in metrics]),
        clients=start.new_tensor(np.asarray(clients, dtype=np.int64)[order], dtype=torch.int64),
        num_steps=steps,
        staleness=torch.zeros_like(steps),
        received=torch.full_like(steps, round - 1),
        models={round - 1: start} if start.dim() == 1 else {},
        round=round,
        layout=layout,
        seed=seed,
        extras=_extras(replies, metrics, start),
    )


def _extras(replies: Sequence[Message], metrics: Sequence[Mapping[str, Any]], like: Tensor) -> dict[str, Tensor]:
    """Return name → (K, …): every number that all clients sent, and their second uploads."""
    names = sorted(set.intersection(*(set(m) for m in metrics)) - {NUM_EXAMPLES, NUM_STEPS, CLIENT})
    numbers = [name for name in names if all(isinstance(m[name], int | float) for m in metrics)]
    extras = {name: like.new_tensor([float(m[name]) for m in metrics]) for name in numbers}
    uploads = [cast(Mapping[str, Array], reply.content.get(EXTRAS, {})) for reply in replies]
    return extras | {
        name: torch.from_numpy(np.stack([upload[name].numpy() for upload in uploads])).to(like) for name in uploads[0]
    }
