"""The Conductor's index beside the truth, after any storm of events, lost messages, restarts and watches begun anew."""

import asyncio
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.feed import Feed
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.commands import Resync
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import StoreLost
from perigee.scheduler.ids import NodeId
from perigee.scheduler.wire import blocks_from_pb

KEYS = [BlockKey(bytes([index]) * 32) for index in range(5)]
NODES = [NodeId("left"), NodeId("right")]


@dataclass
class Node:
    """What a store node holds, and its feed, to which the Conductor is subscribed."""

    id: NodeId
    held: set[tuple[Tier, BlockKey]] = field(default_factory=set)
    starts: int = 0

    def start(self) -> None:
        """Memory is empty then; the SSD is not."""
        self.starts += 1
        self.held = {(tier, key) for tier, key in self.held if tier is Tier.SSD}
        self.feed = Feed(self.id, str(self.starts))
        self.watch()

    def watch(self) -> None:
        snapshot = [BlockEvent(True, key, tier) for tier, key in sorted(self.held)]
        self.messages = self.feed.subscribe(snapshot).messages()
        self.num_ready = 1  # messages that can be taken without waiting

    def change(self, tier: Tier, key: BlockKey) -> None:
        stored = (tier, key) not in self.held
        (self.held.add if stored else self.held.remove)((tier, key))
        self.feed.publish([BlockEvent(stored, key, tier)])
        # The snapshot, if it was not taken yet, brings the change along; one message brings all other changes.
        self.num_ready = max(self.num_ready, 1)

    async def take(self) -> pb.BlockEvents | None:
        if not self.num_ready:
            return None
        self.num_ready -= 1
        return await anext(self.messages)


class Cluster:
    """Two nodes and the Conductor that watches them."""

    def __init__(self) -> None:
        self.conductor = Conductor()
        self.nodes = {node_id: Node(node_id) for node_id in NODES}

    async def deliver(self, node: Node, lost: bool) -> None:
        """A message reaches the Conductor, or is lost on the way. It may ask for a new watch."""
        message = await node.take()
        if message is None:
            return
        if lost:
            if message.snapshot:  # which no stream goes on without: it broke, and is opened again
                node.watch()
            return
        for command in self.conductor.handle(blocks_from_pb(message), 0.0):
            assert isinstance(command, Resync)
            self.nodes[command.node_id].watch()

    def restart(self, node: Node, noticed: bool) -> None:
        if noticed and node.starts:
            self.conductor.handle(StoreLost(node.id, str(node.starts)), 0.0)
        node.start()

    async def settle(self) -> None:
        """All that is under way arrives, and after it one more change of each node, which shows any gap."""
        for node in self.nodes.values():
            node.change(Tier.DRAM, KEYS[0])
            while node.num_ready:
                await self.deliver(node, lost=False)


steps = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(NODES), st.sampled_from(Tier), st.sampled_from(KEYS)),
    st.tuples(st.sampled_from(["deliver", "deliver", "lose"]), st.sampled_from(NODES)),
    st.tuples(st.just("restart"), st.sampled_from(NODES), st.booleans()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=60))
def test_the_conductor_knows_what_the_nodes_hold(storm: list[tuple[object, ...]]) -> None:
    asyncio.run(_play(storm))


async def _play(storm: list[tuple[object, ...]]) -> None:
    cluster = Cluster()
    for node in cluster.nodes.values():
        cluster.restart(node, noticed=True)
    for step in storm:
        match step:
            case ("change", node_id, Tier() as tier, bytes() as key):
                cluster.nodes[NodeId(str(node_id))].change(tier, BlockKey(key))
            case ("restart", node_id, bool() as noticed):
                cluster.restart(cluster.nodes[NodeId(str(node_id))], noticed)
            case (kind, node_id):
                await cluster.deliver(cluster.nodes[NodeId(str(node_id))], lost=kind == "lose")
    await cluster.settle()
    for node_id, node in cluster.nodes.items():
        held = {key for _, key in node.held}
        for key in KEYS:
            known = cluster.conductor.view.prefixes.match([key]).get(node_id, 0)
            assert bool(known) == (key in held)
