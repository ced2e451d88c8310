"""Blocks read by the Mooncake Transfer Engine itself, over its TCP, between two processes."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from perigee.kvstore.dram import Mapping, allocate
from perigee.kvstore.transfer.base import BackendMissing, PeerRefused, TransferFailed, Wanted
from perigee.kvstore.transfer.mooncake import MooncakeEngine, MooncakeTransfer
from perigee.kvstore.transfer.tcp import TcpTransfer
from tests.kvstore.conftest import StartPython
from tests.kvstore.keys import chain
from tests.kvstore.transfers import SLOT_BYTES, WAIT_S, payload, pulled, serving, source_of

SECRET = b"secret"
NUM_SLOTS = 100

# Has NUM_SLOTS blocks, the last of which is corrupt, and commits two more for each line that it reads.
_SERVER = """
import asyncio, sys, threading
from perigee.kvstore.dram import Mapping, allocate
from tests.kvstore.fake_transfer import MemorySource
from perigee.kvstore.transfer.mooncake import MooncakeEngine
from perigee.kvstore.transfer.tcp_server import TransferServer
from tests.kvstore.keys import chain
from tests.kvstore.test_transfer_mooncake import NUM_SLOTS, SECRET
from tests.kvstore.transfers import SLOT_BYTES, payload

SIZE = (NUM_SLOTS + 1) * SLOT_BYTES

async def main():
    mapping = Mapping(allocate(SIZE), SIZE)
    slots = [mapping.view(index * SLOT_BYTES, SLOT_BYTES) for index in range(NUM_SLOTS + 1)]
    for index, slot in enumerate(slots):
        slot[:] = payload(index)
    slots[NUM_SLOTS - 1][-1] ^= 1
    *keys, late = chain("a", NUM_SLOTS + 1)
    source = MemorySource(dict(zip(keys, slots)))
    engine = MooncakeEngine("127.0.0.1", mapping.view(0, SIZE))
    server = TransferServer("child", "127.0.0.1:0", source, secret=SECRET, segment=engine)
    serving = asyncio.create_task(server.serve())
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    source.commit(late, slots[-1])
    await serving

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def mapping() -> Iterator[Mapping]:
    size_bytes = (NUM_SLOTS + 1) * SLOT_BYTES
    mapping = Mapping(allocate(size_bytes), size_bytes)
    yield mapping
    mapping.close()


@pytest.fixture(scope="module")
def engine(mapping: Mapping) -> Iterator[MooncakeEngine]:
    try:
        engine = MooncakeEngine("127.0.0.1", mapping.view(0, mapping.size_bytes))
    except BackendMissing as error:
        pytest.skip(str(error))
    yield engine
    engine.close()


@pytest.fixture
async def transfer(engine: MooncakeEngine) -> AsyncIterator[MooncakeTransfer]:
    transfer = MooncakeTransfer(engine, SECRET)
    yield transfer
    await transfer.close()


@pytest.fixture
def slots(mapping: Mapping) -> list[Wanted]:
    """All of the memory, zeroed, for all that the server has and will have."""
    mapping.view(0, mapping.size_bytes)[:] = bytes(mapping.size_bytes)
    keys = chain("a", NUM_SLOTS + 1)
    return [Wanted(i, key, mapping.view(i * SLOT_BYTES, SLOT_BYTES)) for i, key in enumerate(keys)]


async def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return (await asyncio.to_thread(process.stdout.readline)).strip()


async def test_blocks_are_read_out_of_the_peers_memory_verified_and_awaited(
    transfer: MooncakeTransfer, slots: list[Wanted], start_python: StartPython
) -> None:
    server = start_python(_SERVER)
    received = []
    async for block in transfer.pull(await _line(server), slots, WAIT_S):
        assert slots[block.index].into == payload(block.index)
        received.append(block.index)
        if len(received) == NUM_SLOTS - 1:
            assert server.stdin
            server.stdin.write("\n")
            server.stdin.flush()
    assert sorted(received) == [*range(NUM_SLOTS - 1), NUM_SLOTS]
    assert transfer.corrupt_received_total == 1


async def test_the_same_server_serves_both_ways(
    transfer: MooncakeTransfer, slots: list[Wanted], start_python: StartPython
) -> None:
    address = await _line(start_python(_SERVER))
    tcp = TcpTransfer(SECRET)
    assert len(await pulled(tcp, address, slots[:3])) == 3
    assert len(await pulled(transfer, address, slots[3:6])) == 3
    await tcp.close()


async def test_a_killed_peer_is_a_failure(
    transfer: MooncakeTransfer, slots: list[Wanted], start_python: StartPython
) -> None:
    server = start_python(_SERVER)
    address, got = await _line(server), []
    with pytest.raises(TransferFailed):
        async for block in transfer.pull(address, slots, WAIT_S):
            got.append(block.index)
            server.kill()
    assert 0 < len(got) <= NUM_SLOTS
    assert all(slots[index].into == payload(index) for index in got)


async def test_a_peer_without_an_engine_says_so(transfer: MooncakeTransfer, slots: list[Wanted]) -> None:
    async with serving(source_of(chain("a", 1)), secret=SECRET) as server:
        with pytest.raises(PeerRefused, match="cannot be read directly"):
            await pulled(transfer, server.address, slots[:1])


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(BackendMissing, match=r"perigee\[mooncake\]"):
        MooncakeEngine("127.0.0.1", memoryview(bytearray(4096)))
