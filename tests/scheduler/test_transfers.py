"""What store nodes still send and receive, however many nodes there are."""

import numpy as np
import pytest

from perigee.scheduler.transfers import Transfers


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
