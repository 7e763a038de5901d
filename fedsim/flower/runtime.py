"""Everything of Flower that is not public, and the process-wide state that its strategies use.

No other file touches a name that Flower may change without notice; `tests/test_flower_runtime.py` says which
of them broke when it does.
"""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.app.message import arrayrecord
from flwr.app.message.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM, KEY_NORM_BIT
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.logger import LOGGER_NAME, update_console_handler
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

from fedsim.rng import keyed_bits

CLIPPING_NORM = KEY_CLIPPING_NORM  # what the client-side clipping wrappers send in their config,
NORM_BIT = KEY_NORM_BIT  # and what they want back: 1 where the update was clipped
CLIENT_RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
RUN_ID = 1
SERVER_NODE_ID = 0  # clients are nodes 1, 2, …


def claim_identity() -> None:
    """Make `Message(…)` usable in this process, and Flower as quiet in it as its environment asks.

    A process that a Flower launcher started has an identity: it keeps that, and its log.
    """
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 0
        # Flower looks at the variable when it is imported, which a user's script may do before fedsim sets it.
        update_console_handler(level=os.environ["FLWR_LOG_LEVEL"].upper())


def empty_run() -> Run:
    """Return the description of a run that no SuperLink knows."""
    return Run.create_empty(RUN_ID)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as the SuperLink does when it is pushed."""
    message.metadata.__dict__["_message_id"] = message_id


def with_content(message: Message, content: RecordDict) -> Message:
    """Return a message with the same metadata, id included, and another content."""
    return make_message(metadata=message.metadata, content=content)


def as_sent(content: RecordDict) -> RecordDict:
    """Return what is left of a message's content once it has been bytes, as on a network."""
    parts = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
    received = inflate_object_from_contents(content.object_id, parts)
    assert isinstance(received, RecordDict)  # what was sent
    return received


@contextmanager
def seeded(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's global generators by (seed, purpose, key), and give them back after.

    Flower's strategies draw their samples and noise from the first two, foreign clients from all three.
    """
    bits = int(keyed_bits(seed, purpose, *key))
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the very generator that others use
    with torch.random.fork_rng(devices=devices):
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)  # noqa: NPY002
        if torch.accelerator.is_available():
            torch.manual_seed(bits >> 1)
        else:  # the same without the stack trace that torch.manual_seed keeps for a GPU to come: 0.1 ms a call
            torch.default_generator.manual_seed(bits >> 1)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect what Flower only logs, such as why a strategy skipped its aggregation."""
    lines: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage().strip())  # type: ignore[method-assign]
    logger = logging.getLogger(LOGGER_NAME)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def no_forced_collection() -> Iterator[None]:
    """Keep Flower from collecting garbage once per reply, as QFedAvg and Bulyan do: 0.1–0.3 s each beside torch.

    Reference counts free those arrays without it.
    """
    vars(arrayrecord)["gc"] = SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        vars(arrayrecord)["gc"] = gc
