"""Store nodes and clients as processes of their own, some of which are killed."""

import asyncio
import contextlib
import signal
import subprocess
from pathlib import Path

import pytest

from perigee.kvstore.client import StoreClosed
from perigee.kvstore.config import StoreConfig
from tests.kvstore import payloads
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory, RunningNode, StartPython, connect_to
from tests.kvstore.keys import ROOT, chain

WAIT_S = 60.0  # for what must come; nothing here waits that long

_NODE = """
import asyncio, signal, sys
from perigee.kvstore import node
from perigee.kvstore.config import StoreConfig

async def main():
    serving = asyncio.create_task(node.run(StoreConfig.model_validate_json(sys.argv[1])))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    await asyncio.wait([serving])

asyncio.run(main())
"""

_RESERVE = """
import asyncio, sys
from pathlib import Path
from tests.kvstore.conftest import connect_to
from tests.kvstore.keys import ROOT, chain

async def main():
    client = await connect_to(Path(sys.argv[1]))
    await client.group().acquire(chain("reserved", client.num_slots), ROOT, 0.0)
    print("reserved", flush=True)
    await client.wait_closed()

asyncio.run(main())
"""

# On the other event loop that we support.
_WRITE = """
import asyncio, sys, uvloop
from pathlib import Path
from tests.kvstore import payloads
from tests.kvstore.conftest import connect_to
from tests.kvstore.keys import ROOT, chain

async def main():
    client = await connect_to(Path(sys.argv[1]))
    group = client.group()
    acquired = await group.acquire(chain("written", 6), ROOT, 0.0)
    for reservation in acquired.reserved:
        await group.commit([payloads.write(client, reservation)])
    maps = Path("/proc/self/maps").read_text().splitlines()
    print(next(line.split()[4] for line in maps if "memfd:perigee-arena" in line), flush=True)
    await client.close()

uvloop.run(main())
"""


async def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return (await asyncio.to_thread(process.stdout.readline)).strip()


async def _start_node(
    config: StoreConfig, hosted: HostedDirectory, start_python: StartPython
) -> tuple["subprocess.Popen[str]", RunningNode]:
    process = start_python(_NODE, config.model_dump_json())
    (member,) = await hosted.until(lambda members: [member.pid for member in members] == [process.pid])
    return process, RunningNode(config, member)


def _arena_inode() -> str:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[4] for line in maps if "memfd:perigee-arena" in line)


async def test_blocks_written_by_one_process_are_read_by_another_out_of_the_same_memory(
    store_config: StoreConfig, hosted_directory: HostedDirectory, start_python: StartPython
) -> None:
    _, running = await _start_node(store_config, hosted_directory, start_python)
    client = await running.connect()
    writer = start_python(_WRITE, str(store_config.socket))
    batches = [batch async for batch in client.group().fetch(chain("written", 6), WAIT_S)]
    blocks = [block for batch in batches for block in batch]
    assert sorted(block.index for block in blocks) == list(range(6))
    assert all(payloads.is_intact(client.payload(block.slot), block.index) for block in blocks)
    assert await _line(writer) == _arena_inode()
    await client.close()


async def test_a_killed_client_gives_back_what_it_reserved(
    running_node: RunningNode, start_python: StartPython
) -> None:
    client = await running_node.connect()
    killed = start_python(_RESERVE, str(running_node.config.socket))
    assert await _line(killed) == "reserved"
    assert (await running_node.status()).reserved_blocks == NUM_SLOTS
    waiting = asyncio.ensure_future(client.group().acquire(chain("a", NUM_SLOTS), ROOT, WAIT_S))
    killed.kill()
    assert len((await waiting).reserved) == NUM_SLOTS
    assert (await running_node.status()).orphaned_blocks == 0
    await client.close()


async def test_a_stopped_client_keeps_its_slots_until_it_is_gone(
    running_node: RunningNode, start_python: StartPython
) -> None:
    client = await running_node.connect()
    stopped = start_python(_RESERVE, str(running_node.config.socket))
    assert await _line(stopped) == "reserved"
    stopped.send_signal(signal.SIGSTOP)
    waiting = asyncio.ensure_future(client.group().acquire(chain("a", 1), ROOT, WAIT_S))
    await client.lookup([])
    assert not waiting.done()
    stopped.kill()
    assert len((await waiting).reserved) == 1
    await client.close()


async def test_when_the_node_is_killed_its_clients_hear_it_and_can_come_back_to_a_new_one(
    store_config: StoreConfig, hosted_directory: HostedDirectory, start_python: StartPython
) -> None:
    process, running = await _start_node(store_config, hosted_directory, start_python)
    client = await running.connect()
    await client.group().acquire(chain("a", NUM_SLOTS), ROOT, 0.0)
    acquiring = asyncio.ensure_future(client.group().acquire(chain("b", 1), ROOT, WAIT_S))
    fetching = asyncio.ensure_future(anext(client.group().fetch(chain("a", 1), WAIT_S)))
    await client.lookup([])
    process.kill()
    for waiting in (acquiring, fetching):
        with pytest.raises(StoreClosed):
            await waiting
    await client.wait_closed()
    await hosted_directory.until(lambda members: not members)
    _, restarted = await _start_node(store_config, hosted_directory, start_python)
    assert restarted.member.incarnation != running.member.incarnation
    again = await restarted.connect()
    assert len((await again.group().acquire(chain("a", 3), ROOT, 0.0)).reserved) == 3
    await asyncio.gather(client.close(), again.close())


async def test_a_node_that_is_asked_to_end_leaves_no_file_and_no_member(
    store_config: StoreConfig, hosted_directory: HostedDirectory, start_python: StartPython
) -> None:
    process, running = await _start_node(store_config, hosted_directory, start_python)
    client = await running.connect()
    process.terminate()
    assert await asyncio.to_thread(process.wait) == 0
    await client.wait_closed()
    await client.close()
    await hosted_directory.until(lambda members: not members)
    assert not store_config.socket.exists()
    with contextlib.suppress(StoreClosed):
        await connect_to(store_config.socket)
        pytest.fail("somebody still listens")
