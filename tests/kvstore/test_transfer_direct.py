"""Peers that read memory directly: how the serving side holds blocks for them, whatever does the reading."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.frames import Ask, Kind, Reply
from perigee.kvstore.transfer.handshake import greet, receive_exactly
from perigee.kvstore.transfer.listening import split
from perigee.kvstore.transfer.serving import Limits
from tests.kvstore.fake_transfer import MemorySource
from tests.kvstore.keys import chain
from tests.kvstore.transfers import SLOT_BYTES, WAIT_S, payload, serving, source_of


class _Memory:
    """A `Segment`: what a slot is addressed by is the number in its payload."""

    name = "memory"

    def address(self, payload: memoryview) -> int:
        return 1000 + payload[-1]


@contextlib.asynccontextmanager
async def locating(source: MemorySource, num_keys: int, limits: Limits | None = None) -> AsyncIterator[socket.socket]:
    """A connection over which blocks have been asked for, after what the memory is called."""
    async with serving(source, segment=_Memory(), limits=limits) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, split(server.address))
            await greet(connection, b"")
            request = frames.pack_request(Ask.LOCATE, chain("a", num_keys), round(WAIT_S * 1000))
            await loop.sock_sendall(connection, request)
            assert await reply(connection) == Reply(Kind.SEGMENT, size_bytes=6)
            assert await receive_exactly(connection, 6) == b"memory"
            yield connection


async def reply(connection: socket.socket) -> Reply:
    return Reply.unpack(await receive_exactly(connection, frames.REPLY_BYTES))


async def say_done(connection: socket.socket) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, frames.pack_request(Ask.DONE))


def located(index: int) -> Reply:
    return Reply(Kind.LOCATED, index, 32, 0, SLOT_BYTES, 1000 + index)


async def test_blocks_are_held_until_they_are_read_and_this_is_confirmed() -> None:
    source = source_of(chain("a", 2))
    async with locating(source, 3) as connection:
        assert [await reply(connection) for _ in range(3)] == [located(0), located(1), Reply(Kind.SYNC)]
        await say_done(connection)
        assert await reply(connection) == Reply(Kind.HELD)
        source.commit(chain("a", 3)[2], payload(2))
        assert [await reply(connection) for _ in range(2)] == [located(2), Reply(Kind.SYNC)]
        assert len(source.leased) == 3
        await say_done(connection)
        assert [await reply(connection) for _ in range(2)] == [Reply(Kind.HELD), Reply(Kind.END)]
        await source.until(0)


async def test_a_reader_that_is_slower_than_its_lease_gets_no_confirmation() -> None:
    source = source_of(chain("a", 1))
    async with locating(source, 1, Limits(lease_s=0.05)) as connection:
        assert [await reply(connection) for _ in range(2)] == [located(0), Reply(Kind.SYNC)]
        await source.until(0)
        with pytest.raises((EOFError, ConnectionError)):
            await say_done(connection)
            await reply(connection)


async def test_a_reader_that_leaves_gives_its_leases_back() -> None:
    source = source_of(chain("a", 1))
    async with locating(source, 1) as connection:
        assert await reply(connection) == located(0)
        connection.shutdown(socket.SHUT_RDWR)
        await source.until(0)


async def test_other_requests_while_it_reads_break_the_protocol() -> None:
    source = source_of(chain("a", 1))
    async with locating(source, 1) as connection:
        assert [await reply(connection) for _ in range(2)] == [located(0), Reply(Kind.SYNC)]
        await asyncio.get_running_loop().sock_sendall(connection, frames.pack_request(Ask.PULL, chain("b", 1)))
        with pytest.raises((EOFError, ConnectionError)):
            await reply(connection)
        await source.until(0)
