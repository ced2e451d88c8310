"""What a node tells its watchers: a snapshot of what is committed, then every change, numbered without gaps. Each
message also says how many slots the node has.

The numbers count the events of one stream, the snapshot's among them, so the next message always starts at
`first_seq + len(events)`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.messages import BlockEvent
from perigee.kvstore.wire import event_to_pb

_EVENTS_PER_MESSAGE = 10_000  # some hundred kilobytes, far from gRPC's limit


class Subscription:
    """One watcher's stream. It ends only when more than `limit` events wait that the watcher did not take."""

    def __init__(
        self, node_id: str, incarnation: str, snapshot: Iterable[BlockEvent], limit: int, num_slots: int
    ) -> None:
        self._node_id = node_id
        self._incarnation = incarnation
        self._pending = list(snapshot)
        self._limit = limit + len(self._pending)
        self._num_slots = num_slots
        self._resized = False  # since the last message
        self._next_seq = 0
        self._wake = asyncio.Event()
        self.overflowed = False

    def push(self, events: Sequence[BlockEvent]) -> None:
        """Adds events, or drops everything if the watcher is too slow: it must start again from a snapshot."""
        self._pending.extend(events)
        self.overflowed = self.overflowed or len(self._pending) > self._limit
        if self.overflowed:
            self._pending.clear()
        self._wake.set()

    def resize(self, num_slots: int) -> None:
        """The node has this many slots from here on: the watcher is told even if nothing else happens."""
        self._num_slots = num_slots
        self._resized = True
        self._wake.set()

    async def messages(self) -> AsyncIterator[pb.BlockEvents]:
        """The snapshot, empty or not, then changes as they come."""
        yield self._take(snapshot=True)
        while not self.overflowed:
            if self._pending or self._resized:
                yield self._take(snapshot=False)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _take(self, snapshot: bool) -> pb.BlockEvents:
        events = self._pending[:_EVENTS_PER_MESSAGE]
        del self._pending[:_EVENTS_PER_MESSAGE]
        self._resized = False
        message = pb.BlockEvents(
            node_id=self._node_id,
            incarnation=self._incarnation,
            first_seq=self._next_seq,
            snapshot=snapshot,
            events=[event_to_pb(event) for event in events],
            num_slots=self._num_slots,
        )
        self._next_seq += len(events)
        return message


class Feed:
    """All watchers of a node. Each may be behind by `limit` events."""

    def __init__(self, node_id: str, incarnation: str, limit: int = 100_000) -> None:
        self._node_id = node_id
        self._incarnation = incarnation
        self._limit = limit
        self._num_slots = 0
        self._subscriptions: set[Subscription] = set()

    def subscribe(self, snapshot: Iterable[BlockEvent]) -> Subscription:
        subscription = Subscription(self._node_id, self._incarnation, snapshot, self._limit, self._num_slots)
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def resize(self, num_slots: int) -> None:
        """The node's arena has been cut into this many slots."""
        self._num_slots = num_slots
        for subscription in self._subscriptions:
            subscription.resize(num_slots)

    def publish(self, events: Sequence[BlockEvent]) -> None:
        for subscription in self._subscriptions:
            subscription.push(events)
