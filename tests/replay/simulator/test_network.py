"""What moves between nodes, and the store nodes' jobs in virtual time."""

from collections.abc import Sequence

import pytest

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.evict import make_policy
from perigee.kvstore.messages import Acquired, CommittedBlock, Fetched
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Result
from perigee.replay.keys import ROOT
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.control import Control
from perigee.replay.simulator.network import Link, Network, Nic
from perigee.replay.simulator.node import Node
from perigee.scheduler.commands import Replicate, Trim
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.ids import NodeId
from perigee.workers.messages import ModelCard

BLOCK = 10
KEYS = [BlockKey(bytes([index + 1]) * 32) for index in range(6)]


def test_a_link_serves_one_transfer_after_the_other() -> None:
    link = Link(tokens_per_s=100.0)
    assert link.book(50, since=1.0) == (1.0, 1.5)
    assert link.book(50, since=1.2) == (1.5, 2.0)
    assert link.book(50, since=9.0) == (9.0, 9.5)
    assert link.moved_tokens == 150


def network(layers: int = 1) -> Network:
    nics = {"a": Nic.of(100.0), "b": Nic.of(100.0), "slow": Nic.of(10.0)}
    return Network(latency_s=0.01, layers=layers, nics=nics)


def test_a_transfer_takes_as_long_as_the_slower_side() -> None:
    assert network().send("a", "b", 10, since=0.0, now=0.0) == pytest.approx(0.11)
    assert network().send("a", "slow", 10, since=0.0, now=0.0) == pytest.approx(1.01)


def test_a_sender_does_not_wait_for_a_busy_receiver() -> None:
    net = network()
    net.send("a", "slow", 10, since=0.0, now=0.0)
    assert net.send("a", "b", 10, since=0.0, now=0.0) == pytest.approx(0.21)


def test_what_fits_under_the_computation_takes_no_time_after_it() -> None:
    # Computed from 0 s to 1 s in ten layers: nine of them are sent meanwhile.
    assert network(10).send("a", "b", 10, since=0.0, now=1.0) == pytest.approx(1.0 + 0.1 / 10 + 0.01)
    assert network(10).send("a", "b", 200, since=0.0, now=1.0) == pytest.approx(0.1 + 2.0 + 0.01)
    assert network(1).send("a", "b", 10, since=0.0, now=1.0) == pytest.approx(1.1 + 0.01)


class Cluster:
    """Two store nodes, `a` and `b`."""

    def __init__(self) -> None:
        self.clock = Clock()
        card = ModelCard("m", "", "", "", "", BLOCK, 1000, 2, ROOT)
        self.control = Control(self.clock, Conductor(), card, report_s=0.25)
        net = network()
        for name in ("a", "b"):
            store = Store(8, BLOCK, make_policy("lru", 8))
            node = Node(name, self.clock, store, net, None, lambda name=name: self.control.blocks_changed(name))  # type: ignore[misc]
            node.peers = self.control.nodes
            self.control.nodes[name] = node
        self.control.open()
        self.control.close()

    def put(self, name: str, keys: Sequence[BlockKey]) -> None:
        """Commits blocks on a node."""
        node = self.control.nodes[name]
        group = node.group()

        def commit(result: Result) -> None:
            assert isinstance(result, Acquired)
            written = [CommittedBlock(each.slot, each.nonce, BLOCK, PREFILL) for each in result.reserved]
            node.commit(group, written, self.clock.now)

        node.acquire(group, keys, ROOT, 0.0, commit)
        node.release(group)

    def get(self, name: str, keys: Sequence[BlockKey], source: str, wait_s: float) -> list[tuple[float, int, bool]]:
        """When how many blocks came, and whether that was all."""
        node, came = self.control.nodes[name], []
        group = node.group()

        def receive(result: Result) -> None:
            assert isinstance(result, Fetched)
            came.append((self.clock.now, len(result.blocks), result.done))
            if result.done:
                node.release(group)

        node.fetch(group, keys, wait_s, source, ROOT, receive)
        return came


def test_a_pull_takes_its_turn_on_the_network() -> None:
    cluster = Cluster()
    cluster.put("a", KEYS)
    first = cluster.get("b", KEYS[:2], "a", 0.0)
    second = cluster.get("b", KEYS[2:3], "a", 0.0)
    cluster.clock.run()
    assert first == [(pytest.approx(0.21), 2, True)]
    assert second == [(pytest.approx(0.31), 1, True)]


def test_a_patient_pull_waits_for_what_is_not_there_yet() -> None:
    cluster = Cluster()
    came = cluster.get("b", KEYS[:2], "a", 60.0)
    cluster.clock.at(5.0, cluster.put, "a", KEYS[:2])
    cluster.clock.run()
    assert came == [(pytest.approx(5.21), 2, True)]
    assert all(node.store.moves.is_idle for node in cluster.control.nodes.values())


def test_nobody_waits_for_longer_than_he_said() -> None:
    cluster = Cluster()
    came = cluster.get("b", KEYS[:2], "a", 3.0)
    cluster.clock.run()
    assert [done for _, _, done in came] == [True] and came[0][0] == pytest.approx(3.0, abs=0.1)
    assert all(node.store.index.num_reserved == 0 for node in cluster.control.nodes.values())


def test_the_conductors_copies_are_made_and_dropped() -> None:
    cluster = Cluster()
    control, nodes = cluster.control, cluster.control.nodes
    cluster.put("a", KEYS[:3])
    control.execute(Replicate(NodeId("b"), NodeId("a"), ROOT, tuple(KEYS[:3])))
    cluster.clock.run()
    assert nodes["b"].store.lookup(KEYS[:3]) == [True] * 3
    assert control.conductor.view.prefixes.match(KEYS[:3]) == {"a": 3, "b": 3}
    control.execute(Trim(NodeId("b"), tuple(reversed(KEYS[:3]))))
    cluster.clock.run()
    assert nodes["b"].store.lookup(KEYS[:3]) == [False] * 3
    assert control.conductor.view.prefixes.match(KEYS[:3]) == {"a": 3, "b": 0}
