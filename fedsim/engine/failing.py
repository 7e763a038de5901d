"""Clients that fail and updates that cannot be used: who it was, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsim.engine import apart
from fedsim.engine.blame import users_place
from fedsim.engine.pool import WorkersLost
from fedsim.engine.task import Engine, Job
from fedsim.errors import ClientError

# What torch says of batch norm over a last batch of one sample names neither the batch nor a cure.
ONE_SAMPLE = (
    "; batch norm needs two samples, and the last batch of this client has one: choose another client.batch_size "
    "(null: all of a client's samples at once), or group norm"
)


class BadUpdate(RuntimeError):
    """A client's update is not finite."""


class AllUpdatesBad(RuntimeError):
    """No client of a round sent a finite update."""


def failing(engine: Engine, job: Job, out: Tensor, *, raises: bool) -> dict[int, str]:
    """Find the clients that fail, by training each alone: rows do not depend on one another. Return client → what.

    Args:
        engine: that has failed on the job.
        job: the rows.
        out: (K, D), scratch.
        raises: whether the first one found is raised.

    Raises:
        ClientError: a client fails, where that is asked for.

    """
    found = {}
    for k, client in enumerate(job.clients.tolist()):
        try:
            apart.train(engine, job.part(k, k + 1), out[k : k + 1])
        except (torch.OutOfMemoryError, WorkersLost):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            what += ONE_SAMPLE if "more than 1 value per channel" in what else ""
            if raises:
                place = f" ({line})" if (line := users_place(error)) else ""
                raise ClientError(f"client {client} failed in round {job.round}: {what}{place}") from error
            found[client] = what
    return found


def none_left(job: Job, bad: Sequence[int], failures: Mapping[int, str]) -> AllUpdatesBad:
    """Return what says why no update of a job can be used.

    Args:
        job: the rows.
        bad: clients whose update is not finite.
        failures: client → what it failed with.

    """
    why = [f"{len(bad)} are not finite"] if bad else []
    if failures:
        client, what = next(iter(failures.items()))
        why.append(f"{len(failures)} clients failed, client {client} with {what}")
    return AllUpdatesBad(f"round {job.round}: none of {len(job)} updates can be used: {'; '.join(why)}")
