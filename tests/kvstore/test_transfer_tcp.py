"""Pulling blocks over TCP, between a server and a client that are both alright."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from perigee.kvstore.errors import InvalidRequest
from perigee.kvstore.transfer.base import PeerRefused, TransferFailed
from perigee.kvstore.transfer.frames import MAX_KEYS
from perigee.kvstore.transfer.serving import Limits
from perigee.kvstore.transfer.tcp import TcpTransfer
from tests.kvstore.fake_transfer import MemorySource
from tests.kvstore.keys import chain
from tests.kvstore.transfers import WAIT_S, Slots, payload, pulled, serving, source_of


@pytest.fixture
async def transfer() -> AsyncIterator[TcpTransfer]:
    transfer = TcpTransfer()
    yield transfer
    await transfer.close()


async def test_blocks_arrive_whole_in_their_slots(transfer: TcpTransfer) -> None:
    keys = chain("a", 5)
    slots = Slots(keys)
    async with serving(source_of(keys)) as server:
        received = await pulled(transfer, server.address, slots.wanted)
    assert [(block.index, block.num_tokens, block.origin) for block in received] == [(i, 32, 0) for i in range(5)]
    assert all(slots.holds(index) for index in range(5))
    assert (transfer.received_blocks_total, transfer.corrupt_received_total) == (5, 0)


async def test_what_the_peer_lacks_does_not_come(transfer: TcpTransfer) -> None:
    keys = chain("a", 4)
    async with serving(source_of(keys[:2])) as server:
        assert [block.index for block in await pulled(transfer, server.address, Slots(keys).wanted, 0.0)] == [0, 1]
        assert await pulled(transfer, server.address, Slots(chain("b", 3)).wanted, 0.0) == []


async def test_blocks_come_as_they_are_committed(transfer: TcpTransfer) -> None:
    keys = chain("a", 3)
    source = MemorySource()
    async with serving(source) as server:
        pulling = transfer.pull(server.address, Slots(keys).wanted, WAIT_S)
        async with contextlib.aclosing(pulling) as blocks:
            for index in (2, 0, 1):
                source.commit(keys[index], payload(index))
                assert (await anext(blocks)).index == index
            assert await anext(blocks, None) is None


async def test_waiting_ends_with_the_time_for_it(transfer: TcpTransfer) -> None:
    keys = chain("a", 3)
    async with serving(source_of(keys[:1])) as server:
        assert len(await pulled(transfer, server.address, Slots(keys).wanted, wait_s=0.05)) == 1


async def test_a_pull_of_many_windows_holds_one_window_at_a_time_and_nothing_after(transfer: TcpTransfer) -> None:
    keys = chain("a", 100)
    source, slots = source_of(keys), Slots(keys)
    async with serving(source, limits=Limits(window_blocks=8)) as server:
        assert len(await pulled(transfer, server.address, slots.wanted)) == 100
        assert all(slots.holds(index) for index in range(100))
        await source.until(0)
    assert source.most_leased == 8
    assert (server.served.blocks_total, server.served.bytes_total) == (100, 100 * len(payload(0)))


async def test_pulls_at_the_same_time_do_not_disturb_each_other(transfer: TcpTransfer) -> None:
    keys = chain("a", 20)
    source = source_of(keys)
    all_slots = [Slots(keys) for _ in range(12)]
    async with serving(source) as server:
        pulls = [pulled(transfer, server.address, slots.wanted) for slots in all_slots]
        assert [len(received) for received in await asyncio.gather(*pulls)] == [20] * 12
    assert all(slots.holds(index) for slots in all_slots for index in range(20))


async def test_more_pulls_than_may_be_under_way_take_turns() -> None:
    keys = chain("a", 4)
    transfer = TcpTransfer(max_pulls=2)
    async with serving(source_of(keys)) as server:
        pulls = [pulled(transfer, server.address, Slots(keys).wanted) for _ in range(8)]
        assert [len(received) for received in await asyncio.gather(*pulls)] == [4] * 8
    await transfer.close()


async def test_closing_a_pull_releases_what_it_waits_for_and_the_next_one_works(transfer: TcpTransfer) -> None:
    keys = chain("a", 3)
    source, slots = source_of(keys[:2]), Slots(keys)
    async with serving(source) as server:
        async with contextlib.aclosing(transfer.pull(server.address, slots.wanted, WAIT_S)) as blocks:
            await anext(blocks)
            await source.until(2)
        await source.until(0)
        source.commit(keys[2], payload(2))
        assert len(await pulled(transfer, server.address, slots.wanted)) == 3


async def test_a_cancelled_pull_ends_and_releases(transfer: TcpTransfer) -> None:
    source = MemorySource()
    keys = chain("a", 2)
    async with serving(source) as server:
        pulling = asyncio.create_task(pulled(transfer, server.address, Slots(keys).wanted))
        source.commit(keys[0], payload(0))
        await source.until(1)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await source.until(0)


async def test_a_stopped_server_ends_pulls_and_leases(transfer: TcpTransfer) -> None:
    keys = chain("a", 2)
    source = source_of(keys[:1])
    async with serving(source) as server:
        pulling = asyncio.create_task(pulled(transfer, server.address, Slots(keys).wanted))
        await source.until(1)
    assert source.leased == {}
    with pytest.raises(TransferFailed, match="broke"):
        await pulling


async def test_a_closed_transfer_ends_its_pulls() -> None:
    transfer = TcpTransfer()
    source = source_of(chain("a", 1))
    async with serving(source) as server:
        pulling = asyncio.create_task(pulled(transfer, server.address, Slots(chain("a", 2)).wanted))
        await source.until(1)
        await transfer.close()
        with pytest.raises(TransferFailed):
            await pulling
        await source.until(0)


async def test_with_the_same_secret_nodes_serve_each_other() -> None:
    keys = chain("a", 2)
    transfer = TcpTransfer(b"the secret of this cluster")
    async with serving(source_of(keys), secret=b"the secret of this cluster") as server:
        assert len(await pulled(transfer, server.address, Slots(keys).wanted)) == 2
    await transfer.close()


@pytest.mark.parametrize(("ours", "theirs"), [(b"one", b"another"), (b"", b"another"), (b"one", b"")])
async def test_without_the_same_secret_nothing_is_said(ours: bytes, theirs: bytes) -> None:
    keys = chain("a", 1)
    source = source_of(keys)
    transfer = TcpTransfer(ours)
    async with serving(source, secret=theirs) as server:
        with pytest.raises(PeerRefused, match="secret"):
            await pulled(transfer, server.address, Slots(keys).wanted)
    assert source.most_leased == 0
    await transfer.close()


async def test_a_request_that_is_wrong_in_itself_is_refused_before_it_is_sent(transfer: TcpTransfer) -> None:
    (wanted,) = Slots(chain("a", 1)).wanted
    for wrong in ([], [wanted, wanted], [wanted] * (MAX_KEYS + 1)):
        with pytest.raises(InvalidRequest, match="wanted"):
            await pulled(transfer, "127.0.0.1:1", wrong)
