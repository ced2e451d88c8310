"""Broken links, lying peers, strangers and slow readers."""

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from perigee.kvstore.blocks import HEADER_BYTES
from perigee.kvstore.errors import StoreError
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.base import TransferFailed
from perigee.kvstore.transfer.frames import Ask, Kind, Reply
from perigee.kvstore.transfer.handshake import admit, greet, receive_exactly
from perigee.kvstore.transfer.listening import split
from perigee.kvstore.transfer.serving import Limits
from perigee.kvstore.transfer.tcp import TcpTransfer
from perigee.kvstore.transfer.tcp_server import TransferServer
from tests.kvstore.fake_transfer import MemorySource, payload_of
from tests.kvstore.keys import chain
from tests.kvstore.transfers import SLOT_BYTES, WAIT_S, Slots, payload, proxy, pulled, serving, source_of

# Where the first block's payload starts in what a server says.
_FIRST_PAYLOAD = 3 * frames.REPLY_BYTES + frames.NONCE_BYTES + frames.PROOF_BYTES


@pytest.fixture
async def transfer() -> AsyncIterator[TcpTransfer]:
    transfer = TcpTransfer()
    yield transfer
    await transfer.close()


@contextlib.asynccontextmanager
async def stranger(address: str) -> AsyncIterator[socket.socket]:
    """A connection over which nothing has been said."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, split(address))
        yield connection


async def said(connection: socket.socket) -> bytes:
    """All that the other side says until it ends the connection."""
    loop, data = asyncio.get_running_loop(), b""
    with contextlib.suppress(ConnectionError):
        while more := await loop.sock_recv(connection, 1 << 20):
            data += more
    return data


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 5, 9, 20, HEADER_BYTES - 1, HEADER_BYTES, SLOT_BYTES // 2, SLOT_BYTES - 1])
async def test_a_block_with_a_flipped_byte_is_missing_and_counted(transfer: TcpTransfer, place: int) -> None:
    keys = chain("a", 3)
    flipped = _FIRST_PAYLOAD + frames.REPLY_BYTES + SLOT_BYTES + place  # in the second block

    def flip(start: int, data: bytearray) -> bool:
        if start <= flipped < start + len(data):
            data[flipped - start] ^= 1
        return True

    slots = Slots(keys)
    async with serving(source_of(keys)) as server, proxy(server.address, flip) as link:
        assert [block.index for block in await pulled(transfer, link, slots.wanted)] == [0, 2]
        assert transfer.corrupt_received_total == 1
        assert [block.index for block in await pulled(transfer, server.address, slots.wanted[1:2])] == [1]
    assert all(slots.holds(index) for index in range(3))


async def test_a_block_that_is_wrong_at_its_source_is_missing(transfer: TcpTransfer) -> None:
    keys = chain("a", 2)
    source = source_of(keys)
    source.commit(keys[0], payload_of(bytes(SLOT_BYTES - HEADER_BYTES))[:-1] + b"\1")
    async with serving(source) as server:
        assert [block.index for block in await pulled(transfer, server.address, Slots(keys).wanted)] == [1]
    assert transfer.corrupt_received_total == 1


@pytest.mark.parametrize("blocks_before", [0, 3, 7])
async def test_after_a_cut_the_rest_can_be_pulled(transfer: TcpTransfer, blocks_before: int) -> None:
    keys = chain("a", 8)
    cut = _FIRST_PAYLOAD + blocks_before * (SLOT_BYTES + frames.REPLY_BYTES) + SLOT_BYTES // 2
    source, slots, got = source_of(keys), Slots(keys), []

    def cut_in_the_middle(start: int, data: bytearray) -> bool:
        del data[max(0, cut - start) :]
        return bool(data)

    async with serving(source) as server, proxy(server.address, cut_in_the_middle) as link:
        with pytest.raises(TransferFailed, match="broke"):
            async for block in transfer.pull(link, slots.wanted, WAIT_S):
                got.append(block.index)
        assert got == list(range(blocks_before))
        await source.until(0)
        rest = [block.index for block in await pulled(transfer, server.address, slots.wanted[blocks_before:])]
    assert got + rest == list(range(8))
    assert all(slots.holds(index) for index in range(8))


async def test_a_peer_that_cannot_be_reached_is_a_failure_at_once_without_time_to_wait(transfer: TcpTransfer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(TransferFailed, match="cannot reach"):
        await pulled(transfer, address, Slots(chain("a", 1)).wanted, wait_s=0.0)


async def test_what_is_no_address_is_a_failure_at_once(transfer: TcpTransfer) -> None:
    with pytest.raises(TransferFailed, match="host:port"):
        await pulled(transfer, "nowhere", Slots(chain("a", 1)).wanted)


async def test_a_peer_that_comes_while_there_is_time_is_reached(transfer: TcpTransfer) -> None:
    keys = chain("a", 2)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    pulling = asyncio.create_task(pulled(transfer, address, Slots(keys).wanted))
    server = TransferServer("late", address, source_of(keys))
    task = asyncio.create_task(server.serve())
    assert len(await pulling) == 2
    task.cancel()
    await asyncio.wait([task])
    server.close()


async def test_a_peer_that_was_restarted_is_reached_again(transfer: TcpTransfer) -> None:
    keys = chain("a", 2)
    async with serving(source_of(keys)) as server:
        await pulled(transfer, server.address, Slots(keys).wanted)
        address = server.address
    again = TransferServer("again", address, source_of(keys))
    task = asyncio.create_task(again.serve())
    assert len(await pulled(transfer, address, Slots(keys).wanted, wait_s=0.0)) == 2
    task.cancel()
    await asyncio.wait([task])
    again.close()


async def test_idle_connections_are_closed_and_replaced(transfer: TcpTransfer) -> None:
    keys = chain("a", 1)
    async with serving(source_of(keys), limits=Limits(idle_s=1.0)) as server:
        for _ in range(2):
            assert len(await pulled(transfer, server.address, Slots(keys).wanted)) == 1
            async with stranger(server.address) as connection:
                await greet(connection, b"")
                await said(connection)  # until this one was closed for its silence, and the other with it


# ---- peers that lie --------------------------------------------------------------------------------------------------


def _block(index: int, size_bytes: int = SLOT_BYTES) -> bytes:
    return Reply(Kind.BLOCK, index, 32, 0, size_bytes).pack()


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (_block(2), "not asked for"),
        (_block(0) + payload(0) + _block(0), "came already"),
        (_block(0, SLOT_BYTES + 4096) + payload(0), "allowed are the slot's"),
        (_block(0, SLOT_BYTES - 4096) + payload(0), "allowed are the slot's"),
        (Reply(Kind.HELD).pack(), "HELD"),
        (bytes(frames.REPLY_BYTES), "kind 0"),
        (b"\xff" * 1000, "kind 255"),
        (frames.pack_text(Kind.REFUSED, "not today"), "not today"),
        (Reply(Kind.REFUSED, size_bytes=1 << 40).pack(), "text of"),
        (b"", "closed"),
    ],
)
async def test_a_peer_that_says_what_it_may_not_is_left(transfer: TcpTransfer, lie: bytes, complaint: str) -> None:
    slots = Slots(chain("a", 2))

    async def lying(connection: socket.socket) -> None:
        await admit(connection, b"")
        await receive_exactly(connection, frames.REQUEST_BYTES + 2 * 32)
        await asyncio.get_running_loop().sock_sendall(connection, lie)

    async with one_conversation(lying) as address:
        with pytest.raises(TransferFailed, match=complaint):
            await pulled(transfer, address, slots.wanted)
    assert not slots.holds(1)


async def test_something_else_that_listens_there_is_no_peer(transfer: TcpTransfer) -> None:
    async def talk_http(connection: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(connection, b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))

    async with one_conversation(talk_http) as address:
        with pytest.raises(TransferFailed, match="cannot reach"):
            await pulled(transfer, address, Slots(chain("a", 1)).wanted, wait_s=0.0)


@contextlib.asynccontextmanager
async def one_conversation(talk: Callable[[socket.socket], Awaitable[None]]) -> AsyncIterator[str]:
    """The address of a listener that has this conversation with the first who connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def converse() -> None:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            with connection:
                await talk(connection)

        conversation = asyncio.create_task(converse())
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        await conversation


# ---- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_words", "complaint"),
    [
        (b"GET / HTTP/1.1\r\nHost: perigee\r\nUser-Agent: x\r\n\r\n", b"magic"),
        (frames.pack_hello(bytes(32))[:4] + b"\x09" + frames.pack_hello(bytes(32))[5:], b"version"),
        (frames.pack_hello(bytes(32)) + b"\x01" * 32, b"secret"),
    ],
)
async def test_who_does_not_belong_is_told_why_and_cut_off(first_words: bytes, complaint: bytes) -> None:
    keys = chain("a", 1)
    async with serving(source_of(keys), secret=b"secret") as server, stranger(server.address) as connection:
        await asyncio.get_running_loop().sock_sendall(connection, first_words)
        answer = await said(connection)
        transfer = TcpTransfer(b"secret")
        assert len(await pulled(transfer, server.address, Slots(keys).wanted)) == 1
        await transfer.close()
    assert complaint in answer or answer == b""  # the reset may overtake the words
    assert Reply(Kind.ACCEPTED).pack() not in answer


_KEYS = b"".join(chain("a", 2))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\xff" * 64,
        frames.pack_request(Ask.DONE),
        frames.pack_request(Ask.PULL),
        frames.pack_request(Ask.PULL, [*chain("a", 1), *chain("a", 1)]),
        b"\x01\0\0\0\xff\xff\xff\xff\0\0\0\0" + _KEYS,
        frames.pack_request(Ask.LOCATE, chain("a", 1)),
    ],
)
async def test_a_request_that_breaks_the_protocol_ends_the_connection(request_bytes: bytes) -> None:
    source = source_of(chain("a", 2))
    async with serving(source) as server, stranger(server.address) as connection:
        await greet(connection, b"")
        await asyncio.get_running_loop().sock_sendall(connection, request_bytes)
        answer = await said(connection)
    assert len(answer) < SLOT_BYTES
    assert source.most_leased == 0


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:0", "somewhere", "127.0.0.1:99999"])
async def test_beyond_loopback_a_secret_is_needed(address: str) -> None:
    with pytest.raises(StoreError, match="transfer_listen"):
        TransferServer("node", address, MemorySource())


async def test_with_a_secret_all_interfaces_are_allowed() -> None:
    server = TransferServer("node", "0.0.0.0:0", MemorySource(), secret=b"secret")
    assert split(server.address)[0] == "0.0.0.0"
    server.close()


# ---- slow readers, and memory ----------------------------------------------------------------------------------------


async def test_a_reader_slower_than_its_lease_is_cut_off_and_only_then_are_its_leases_over() -> None:
    keys, slot_bytes = chain("a", 64), 1 << 20  # far more than sockets buffer
    source = source_of(keys, slot_bytes)
    async with serving(source, limits=Limits(lease_s=0.3)) as server, stranger(server.address) as slow:
        await greet(slow, b"")
        await asyncio.get_running_loop().sock_sendall(slow, frames.pack_request(Ask.PULL, keys))
        await source.until(64)
        assert server.served.fenced_total == 0
        await source.until(0)
        assert server.served.fenced_total == 1
        assert len(await said(slow)) < 64 * slot_bytes


async def test_others_are_served_while_a_slow_reader_holds_its_leases(transfer: TcpTransfer) -> None:
    keys = chain("a", 64)
    source = source_of(keys, 1 << 20)
    async with serving(source) as server, stranger(server.address) as slow:
        await greet(slow, b"")
        await asyncio.get_running_loop().sock_sendall(slow, frames.pack_request(Ask.PULL, keys))
        await source.until(64)
        slots = Slots(keys[:3], 1 << 20)
        assert len(await pulled(transfer, server.address, slots.wanted)) == 3


async def test_a_pull_takes_no_memory_besides_the_slots(transfer: TcpTransfer) -> None:
    keys, slot_bytes = chain("a", 32), 1 << 20
    slots = Slots(keys, slot_bytes)
    async with serving(source_of(keys, slot_bytes)) as server:
        await pulled(transfer, server.address, slots.wanted[:1])
        tracemalloc.start()
        try:
            assert len(await pulled(transfer, server.address, slots.wanted)) == 32
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < slot_bytes
