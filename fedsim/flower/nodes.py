"""Flower nodes in this process: a deployment's messages, as bytes, without SuperLink and SuperNodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim.flower import runtime


class LocalNodes(Grid):
    """A grid whose nodes answer at once, one after another: to try an app before it is deployed.

    What goes either way is turned into bytes and back, so that it is no more than what a network carries.

    Args:
        app: the ClientApp of all nodes.
        num_nodes: node i has "partition-id" i.

    """

    def __init__(self, app: ClientApp, num_nodes: int) -> None:
        runtime.claim_identity()
        self.app = app
        self.gone: set[int] = set()  # partition-ids of nodes that never answer
        self._contexts = {
            i + 1: Context(
                run_id=runtime.RUN_ID, node_id=i + 1, node_config={"partition-id": i, "num-partitions": num_nodes},
                state=RecordDict(), run_config={},
            )
            for i in range(num_nodes)
        }  # fmt: skip
        self._run = runtime.empty_run()
        self._replies: dict[str, Message] = {}
        self._num_pushed = 0

    def set_run(self, run: Any) -> None:
        """Set the run's description."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run's description: empty, for no SuperLink knows it."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return all nodes, those that are gone too: a SuperLink takes a while to notice."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer messages, and return their ids."""
        ids = []
        for message in messages:
            self._num_pushed += 1
            ids.append(str(self._num_pushed))
            runtime.set_message_id(message, ids[-1])
            for reply in self.send_and_receive([message]):  # one, or none of a node that is gone
                self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages that were pushed."""
        return [self._replies[i] for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """Return the replies of all nodes that are there."""
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node - 1 not in self.gone:
                received = runtime.with_content(message, runtime.as_sent(message.content))
                reply = self.app(received, self._contexts[node])
                replies.append(runtime.with_content(reply, runtime.as_sent(reply.content)))
        return replies
