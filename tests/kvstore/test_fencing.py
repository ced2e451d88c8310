"""Writers and readers slower than their deadlines: they are refused, and nothing of theirs is reused before."""

import asyncio
import socket
from pathlib import Path

import pytest

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.client import Fenced, NoRoom
from perigee.kvstore.transfer import frames, listening
from perigee.kvstore.transfer.frames import Ask
from perigee.kvstore.transfer.handshake import greet
from tests.kvstore import payloads
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import WAIT_S, acquainted, config_of, get, put, running

LARGE_BYTES = 1 << 20  # all slots together are more than a connection buffers


async def test_a_commit_after_its_deadline_is_refused_and_its_slots_are_kept_until_the_writer_lets_go(
    tmp_path: Path, hosted_directory: HostedDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(hosted_directory, tmp_path, "node", reservation_s=1e-9)
    async with running(config, hosted_directory) as node:
        writer, other = await node.connect(), await node.connect()
        group, keys = writer.group(), chain("late", 3)
        reserved = (await group.acquire(keys, ROOT, 0.0)).reserved
        with pytest.raises(Fenced, match="its reservation ended"):
            await group.commit([payloads.write(writer, reservation) for reservation in reserved])
        assert await other.lookup(keys) == [False] * 3
        with pytest.raises(NoRoom):
            await other.group().acquire(chain("other", NUM_SLOTS), ROOT, 0.0)
        status = await node.status()
        assert (status.fenced_total, status.overdue_blocks, status.orphaned_blocks) == (1, 3, 0)
        waiting = asyncio.ensure_future(other.group().acquire(chain("other", NUM_SLOTS), ROOT, WAIT_S))
        await writer.close()
        assert len((await waiting).reserved) == NUM_SLOTS
        await other.close()
    assert "writer fenced worker=worker" in caplog.text


async def test_a_reader_slower_than_its_lease_is_cut_off_when_its_slots_are_wanted_and_not_before(
    tmp_path: Path, hosted_directory: HostedDirectory
) -> None:
    config = config_of(hosted_directory, tmp_path, "node", dram_bytes=NUM_SLOTS * LARGE_BYTES, transfer_lease_s=3.0)
    async with running(config, hosted_directory) as node:
        worker = await node.connect(LARGE_BYTES)
        keys = chain("read", NUM_SLOTS)
        (await put(worker, keys)).release()
        with await _reader(node.member.transfer_address, keys) as reader:
            await asyncio.to_thread(reader.recv, 1, socket.MSG_PEEK)  # it is being served, and reads no further
            with pytest.raises(NoRoom):
                await worker.group().acquire(chain("other", NUM_SLOTS), ROOT, 0.0)
            acquired = await worker.group().acquire(chain("other", NUM_SLOTS), ROOT, WAIT_S)
            assert len(acquired.reserved) == NUM_SLOTS
            for reservation in acquired.reserved:
                payloads.write(worker, reservation)
            sent = await asyncio.to_thread(_rest, reader)
        assert len(sent) < NUM_SLOTS * LARGE_BYTES
        assert set(_first_payload(sent)) == {0}, "what was sent is what was asked for"
        status = await node.status()
        assert (status.fenced_total, status.orphaned_blocks) == (1, 0)
        await worker.close()


async def test_a_reader_in_time_is_not_cut_off(tmp_path: Path, hosted_directory: HostedDirectory) -> None:
    far, near = (config_of(hosted_directory, tmp_path, name, transfer_lease_s=30.0) for name in ("far", "near"))
    async with running(far, hosted_directory) as there, running(near, hosted_directory) as here:
        await acquainted(there, here)
        writer, reader = await there.connect(), await here.connect()
        (await put(writer, chain("a", 4))).release()
        assert len(await get(reader, chain("a", 4), "far")) == 4
        assert (await there.status()).fenced_total == 0
        await asyncio.gather(writer.close(), reader.close())


async def _reader(address: str, keys: list[BlockKey]) -> socket.socket:
    """A connection that has asked for all blocks."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    reader.setblocking(False)
    await asyncio.get_running_loop().sock_connect(reader, listening.split(address))
    await greet(reader, b"")
    reader.setblocking(True)
    reader.sendall(frames.pack_request(Ask.PULL, keys))
    return reader


def _rest(reader: socket.socket) -> bytes:
    """What still comes, until the connection ends."""
    received = bytearray()
    try:
        while data := reader.recv(1 << 20):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def _first_payload(sent: bytes) -> bytes:
    """As much of it as a connection buffers at least, without the headers."""
    return sent[4096:32768]
