"""SIGKILL at every step of a put, and of a spill."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.client import StoreClient
from perigee.kvstore.messages import Tier
from tests.kvstore import payloads
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory, RunningNode, StartPython
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import WAIT_S, config_of, get, put, running

# Stops for good at the step that it is told.
_PUT = """
import asyncio, sys
from pathlib import Path
from tests.kvstore import payloads
from tests.kvstore.conftest import connect_to
from tests.kvstore.keys import ROOT, chain

async def reach(step):
    if step == sys.argv[2]:
        print(step, flush=True)
        await asyncio.Event().wait()

async def main():
    client = await connect_to(Path(sys.argv[1]))
    await reach("connected")
    group = client.group()
    acquired = await group.acquire(chain("put", 4), ROOT, 0.0)
    await reach("reserved")
    client.payload(acquired.reserved[0].slot)[:100] = bytes(100)
    await reach("writing")
    written = [payloads.write(client, r) for r in acquired.reserved]
    await reach("written")
    await group.commit(written[:2])
    await reach("half committed")
    await group.commit(written[2:])
    await reach("committed")
    group.release()
    await client.lookup([])
    await reach("released")

asyncio.run(main())
"""
_COMMITTED = {"half committed": 2, "committed": 4, "released": 4}
_PUT_STEPS = ["connected", "reserved", "writing", "written", *_COMMITTED]

# A node whose second write of a record stops for good at the step that it is told.
_NODE = """
import asyncio, itertools, sys, threading
from perigee.kvstore import node, ssd
from perigee.kvstore.config import StoreConfig

step, write, records = sys.argv[2], ssd.SegmentFile.write, itertools.count(1)

def stop():
    print(step, flush=True)
    threading.Event().wait()

def stopping(self, buffers, offset):
    if len(buffers) < 2:  # the header of a segment
        return write(self, buffers, offset)
    second = next(records) == 2
    if second and step == "before the write":
        stop()
    if second and step == "after the header":
        write(self, buffers[:1], offset)
        stop()
    if second and step == "amid the payload":
        write(self, [buffers[0], buffers[1][:4096]], offset)
        stop()
    write(self, buffers, offset)
    if second:
        stop()

ssd.SegmentFile.write = stopping
asyncio.run(node.run(StoreConfig.model_validate_json(sys.argv[1])))
"""
_SPILL_STEPS = ["before the write", "after the header", "amid the payload", "after the write"]


async def _says(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return (await asyncio.to_thread(process.stdout.readline)).strip()


@pytest.mark.parametrize("step", _PUT_STEPS)
async def test_a_writer_that_is_killed_leaves_what_it_committed_and_nothing_else(
    running_node: RunningNode, start_python: StartPython, step: str
) -> None:
    client = await running_node.connect()
    writer = start_python(_PUT, str(running_node.config.socket), step)
    assert await _says(writer) == step
    writer.kill()
    committed = _COMMITTED.get(step, 0)
    # The slots that it had are free for a request that needs all of them, but for the blocks that are to be read.
    reading = client.group()
    if committed:
        await anext(reading.fetch(chain("put", committed), 0.0))
    acquired = await client.group().acquire(chain("other", NUM_SLOTS - committed), ROOT, WAIT_S)
    assert len(acquired.reserved) == NUM_SLOTS - committed
    assert await client.lookup(chain("put", 4)) == [index < committed for index in range(4)]
    if committed:
        await get(client, chain("put", committed))
    assert (await running_node.status()).orphaned_blocks == 0
    await client.close()


@pytest.mark.parametrize("step", _SPILL_STEPS)
async def test_a_node_that_is_killed_while_it_spills_comes_back_with_whole_blocks_only(
    tmp_path: Path, hosted_directory: HostedDirectory, start_python: StartPython, step: str
) -> None:
    config = config_of(hosted_directory, tmp_path, "node", ssd=True)
    process = start_python(_NODE, config.model_dump_json(), step)
    (member,) = await hosted_directory.until(lambda members: [member.pid for member in members] == [process.pid])
    client = await RunningNode(config, member).connect()
    spilling = asyncio.ensure_future(_fill(client))
    assert await _says(process) == step
    process.kill()
    # It leaves the directory before it is gone, and with it the lock on its folder.
    await asyncio.to_thread(process.wait)
    await asyncio.gather(spilling, return_exceptions=True)
    await client.close()
    await hosted_directory.until(lambda members: not members)
    async with running(config, hosted_directory) as node:
        again = await node.connect()
        here = await again.lookup(chain("spilled", NUM_SLOTS))
        for index, is_here in enumerate(here):
            if is_here:
                acquired = await again.group().acquire(chain("spilled", NUM_SLOTS)[index : index + 1], ROOT, WAIT_S)
                assert [block.tier for block in acquired.leased] == [Tier.SSD]
                assert payloads.is_intact(again.payload(acquired.leased[0].slot), 0)
        status = await node.status()
        assert (status.ssd_state, status.orphaned_blocks) == (pb.SSD_ON, 0)
        await again.close()


async def _fill(client: StoreClient) -> None:
    """Single blocks, used twice each, one after the other; the first ones have to leave."""
    for key in chain("spilled", NUM_SLOTS):
        for _ in range(2):
            (await put(client, [key])).release()
