"""Blocks between processes, on either event loop, some of which are killed."""

import asyncio
import subprocess

import pytest

from perigee.kvstore.transfer.base import TransferFailed
from perigee.kvstore.transfer.tcp import TcpTransfer
from tests.kvstore.conftest import StartPython
from tests.kvstore.keys import chain
from tests.kvstore.transfers import WAIT_S, Slots, pulled, serving, source_of

_SERVER = """
import asyncio, sys, uvloop
from perigee.kvstore.transfer.tcp_server import TransferServer
from tests.kvstore.keys import chain
from tests.kvstore.transfers import source_of

async def main():
    server = TransferServer("child", "127.0.0.1:0", source_of(chain("a", int(sys.argv[1]))), secret=b"secret")
    print(server.address, flush=True)
    await server.serve()

uvloop.run(main())
"""

_CLIENT = """
import sys, uvloop
from perigee.kvstore.transfer.tcp import TcpTransfer
from tests.kvstore.keys import chain
from tests.kvstore.transfers import WAIT_S, Slots

async def main():
    slots = Slots(chain("a", 4))
    async for block in TcpTransfer(b"secret").pull(sys.argv[1], slots.wanted, WAIT_S):
        print(block.index, slots.holds(block.index), flush=True)

uvloop.run(main())
"""


async def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return (await asyncio.to_thread(process.stdout.readline)).strip()


async def test_blocks_cross_from_one_process_to_another(start_python: StartPython) -> None:
    slots = Slots(chain("a", 200))
    transfer = TcpTransfer(b"secret")
    received = await pulled(transfer, await _line(start_python(_SERVER, "200")), slots.wanted)
    assert [block.index for block in received] == list(range(200))
    assert all(slots.holds(index) for index in range(200))
    await transfer.close()


async def test_when_the_serving_process_is_killed_the_pull_fails_and_the_rest_comes_from_elsewhere(
    start_python: StartPython,
) -> None:
    keys = chain("a", 4)
    slots = Slots(keys)
    transfer = TcpTransfer(b"secret")
    killed = start_python(_SERVER, "2")  # and so waits for the other two
    address = await _line(killed)
    got = []
    with pytest.raises(TransferFailed):
        async for block in transfer.pull(address, slots.wanted, WAIT_S):
            got.append(block.index)
            if len(got) == 2:
                killed.kill()
    assert got == [0, 1]
    elsewhere = await _line(start_python(_SERVER, "4"))
    assert [block.index for block in await pulled(transfer, elsewhere, slots.wanted[2:])] == [2, 3]
    assert all(slots.holds(index) for index in range(4))
    with pytest.raises(TransferFailed, match="cannot reach"):
        await pulled(transfer, address, slots.wanted, wait_s=0.0)
    await transfer.close()


async def test_when_the_pulling_process_is_killed_its_leases_end(start_python: StartPython) -> None:
    source = source_of(chain("a", 3))
    async with serving(source, secret=b"secret") as server:
        killed = start_python(_CLIENT, server.address)
        assert [await _line(killed) for _ in range(3)] == ["0 True", "1 True", "2 True"]
        assert len(source.leased) == 3
        killed.kill()
        await source.until(0)
