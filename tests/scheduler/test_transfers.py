"""What store nodes still send and receive, however many nodes there are."""

import numpy as np
import pytest

from perigee.scheduler.events import StoreLost
from perigee.scheduler.ids import NodeId
from perigee.scheduler.transfers import Transfers
from tests.scheduler.cluster import Cluster


def test_a_node_receives_one_transfer_after_another() -> None:
    transfers = Transfers()
    transfers.book(source=0, target=1, seconds=2.0, now=10.0)
    transfers.book(source=2, target=1, seconds=3.0, now=10.0)
    assert transfers.receive_wait_s(np.array([1]), 11.0).tolist() == [4.0]
    assert transfers.wait_s(source=3, target=1, now=11.0) == 4.0
    assert transfers.wait_s(source=0, target=4, now=11.0) == 1.0


def test_nodes_that_receive_nothing_wait_for_nothing_whatever_their_number() -> None:
    transfers = Transfers()
    transfers.book(source=0, target=100, seconds=2.0, now=0.0)
    waits_s = transfers.receive_wait_s(np.array([0, 99, 100, 101, 5000]), 1.0).tolist()
    assert [max(0.0, wait_s) for wait_s in waits_s] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert transfers.wait_s(source=1, target=5000, now=1.0) == 0.0


@pytest.mark.parametrize("node", [1, 5000])
def test_a_number_that_is_forgotten_owes_nothing(node: int) -> None:
    transfers = Transfers()
    transfers.book(source=1, target=1, seconds=2.0, now=0.0)
    transfers.forget(node)
    assert transfers.wait_s(source=2, target=node, now=0.0) == 0.0
    assert transfers.wait_s(source=node, target=2, now=0.0) == 0.0


def test_a_node_that_takes_anothers_number_has_nothing_to_transfer() -> None:
    cluster = Cluster()
    for node in ("first", "second"):
        cluster.add_store(NodeId(node))
    view = cluster.conductor.view
    view.transfers.book(view.prefixes.numbers[NodeId("second")], 5, 1000.0, cluster.now)
    cluster.hear(StoreLost(NodeId("first"), "1"))
    for node in ("second", "third"):  # the second tells anew, and has the first one's number now
        cluster.add_store(NodeId(node))
    waits_s = [view.transfers.send_wait_s(number, cluster.now) for number in view.prefixes.numbers.values()]
    assert waits_s == [0.0, 0.0]
