"""A store node over real sockets and shared memory, with its clients in the same event loop."""

import asyncio
import contextlib
import functools
import gc
import os
import random
import socket
import stat
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import node
from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.client import (
    BlocksMissing,
    InvalidRequest,
    LeaseGroup,
    NoRoom,
    StoreClient,
    StoreClosed,
    StoreError,
    TooLarge,
)
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.feed import Feed
from perigee.kvstore.framing import MAX_FRAME_BYTES, frame
from tests.kvstore import payloads
from tests.kvstore.conftest import BLOCK_TOKENS, NUM_SLOTS, PAYLOAD_BYTES, Connect, HostedDirectory, RunningNode
from tests.kvstore.keys import ROOT, chain

WAIT_S = 60.0  # for what must come; nothing here waits that long


async def _put(client: StoreClient, keys: list[BlockKey], parent: BlockKey = ROOT) -> LeaseGroup:
    group = client.group()
    acquired = await group.acquire(keys, parent, 0.0)
    await group.commit([payloads.write(client, reservation) for reservation in acquired.reserved])
    return group


async def test_one_client_reads_in_shared_memory_what_another_wrote(connect: Connect) -> None:
    writer, reader = await connect(), await connect()
    keys = chain("a", 5)
    (await _put(writer, keys)).release()
    group = reader.group()
    batches = [batch async for batch in group.fetch(keys, WAIT_S)]
    blocks = [block for batch in batches for block in batch]
    assert [(block.index, block.num_tokens, block.remote) for block in blocks] == [(i, 32, False) for i in range(5)]
    assert all(payloads.is_intact(reader.payload(block.slot), block.index) for block in blocks)
    writer.payload(blocks[0].slot)[100] = 77
    assert reader.payload(blocks[0].slot)[100] == 77


async def test_a_waiting_fetch_gets_blocks_as_they_are_committed(connect: Connect) -> None:
    writer, reader = await connect(), await connect()
    keys = chain("a", 3)
    writing = writer.group()
    acquired = await writing.acquire(keys, ROOT, 0.0)
    fetch = reader.group().fetch(keys, WAIT_S)
    for reservation in acquired.reserved:
        batch = asyncio.ensure_future(anext(fetch))
        await reader.lookup(keys)  # the fetch is at the node when this is answered
        assert not batch.done()
        await writing.commit([payloads.write(writer, reservation)])
        (block,) = await batch
        assert block.index == reservation.index
        assert payloads.is_intact(reader.payload(block.slot), block.index)
    with pytest.raises(StopAsyncIteration):
        await anext(fetch)


async def test_a_fetch_names_what_did_not_come(connect: Connect) -> None:
    client = await connect()
    keys = chain("a", 3)
    await _put(client, keys[:1])
    fetch = client.group().fetch(keys, 0.01)
    (block,) = await anext(fetch)
    assert block.index == 0
    with pytest.raises(BlocksMissing) as missing:
        await anext(fetch)
    assert missing.value.indices == (1, 2)


async def test_what_is_to_come_from_a_node_that_nobody_knows_is_missing(
    connect: Connect, running_node: RunningNode
) -> None:
    client = await connect()
    for source in ("elsewhere", client.node_id):
        with pytest.raises(BlocksMissing):
            await anext(client.group().fetch(chain("a", 1), 0.0, source=source))
    status = await running_node.status()
    assert (status.failed_pulls_total, status.free_slots, status.orphaned_blocks) == (1, NUM_SLOTS, 0)


async def test_an_acquire_waits_for_a_release_and_is_refused_without_one(connect: Connect) -> None:
    client = await connect()
    holding = client.group()
    await holding.acquire(chain("a", NUM_SLOTS), ROOT, 0.0)
    for wait_s in (0.0, 0.01):
        with pytest.raises(NoRoom, match="1 blocks; 0 of 16 slots"):
            await client.group().acquire(chain("b", 1), ROOT, wait_s)
    waiting = asyncio.ensure_future(client.group().acquire(chain("b", 3), ROOT, WAIT_S))
    await client.lookup([])
    assert not waiting.done()
    holding.release()
    holding.release()
    assert len((await waiting).reserved) == 3
    with pytest.raises(InvalidRequest, match="released"):
        await holding.acquire([], ROOT, 0.0)


async def test_releasing_a_group_ends_its_waiting_requests(connect: Connect) -> None:
    client = await connect()
    await client.group().acquire(chain("a", NUM_SLOTS), ROOT, 0.0)
    group = client.group()
    waiting = asyncio.ensure_future(group.acquire(chain("b", 1), ROOT, WAIT_S))
    fetching = asyncio.ensure_future(anext(group.fetch(chain("a", 1), WAIT_S)))
    await client.lookup([])
    group.release()
    with pytest.raises(NoRoom):
        await waiting
    with pytest.raises(BlocksMissing):
        await fetching


async def test_a_closed_client_leaves_no_lease_and_no_reservation(connect: Connect, running_node: RunningNode) -> None:
    leaving, staying = await connect(), await connect()
    await _put(leaving, chain("a", 4))
    await leaving.group().acquire(chain("b", 12), ROOT, 0.0)
    waiting = asyncio.ensure_future(staying.group().acquire(chain("c", NUM_SLOTS), ROOT, WAIT_S))
    await leaving.close()
    assert len((await waiting).reserved) == NUM_SLOTS
    status = await running_node.status()
    assert (status.orphaned_blocks, status.leased_blocks, status.connections) == (0, 0, 1)
    with pytest.raises(StoreClosed):
        await leaving.lookup([])


async def test_more_than_the_arena_holds_is_too_large(connect: Connect) -> None:
    with pytest.raises(TooLarge, match=f"17 blocks; the arena has {NUM_SLOTS} slots"):
        await (await connect()).group().acquire(chain("a", NUM_SLOTS + 1), ROOT, WAIT_S)


async def test_a_request_too_large_for_a_frame_is_refused_before_it_is_sent(connect: Connect) -> None:
    client = await connect()
    with pytest.raises(InvalidRequest, match=f"allowed are {MAX_FRAME_BYTES}"):
        await client.lookup(chain("a", 1) * (MAX_FRAME_BYTES // 32))
    assert await client.lookup(chain("a", 2)) == [False, False]


async def test_status_counts_what_happened(connect: Connect, running_node: RunningNode) -> None:
    assert (await running_node.status()).num_slots == 0  # nobody said yet how large a block is
    client = await connect()
    held = await _put(client, chain("a", 4))
    await held.acquire(chain("a", 6), ROOT, 0.0)
    (await _put(client, chain("b", 10))).release()
    (await _put(client, chain("c", 2))).release()
    status = await running_node.status()
    assert (status.node_id, status.incarnation) == (running_node.member.id, running_node.member.incarnation)
    assert (status.slot_bytes, status.num_slots, status.connections) == (PAYLOAD_BYTES, NUM_SLOTS, 1)
    assert (status.committed_blocks, status.leased_blocks, status.reserved_blocks, status.free_slots) == (14, 4, 2, 0)
    assert (status.stored_total, status.evicted_total) == (16, 2)
    assert (status.hit_blocks_total, status.miss_blocks_total) == (4, 18)
    assert status.orphaned_blocks == 0


# ---- admission ------------------------------------------------------------------------------------------------------


async def test_the_first_worker_fixes_what_a_block_is(connect: Connect, running_node: RunningNode) -> None:
    client = await connect()
    assert (client.node_id, client.slot_bytes, client.num_slots) == ("store-0", PAYLOAD_BYTES, NUM_SLOTS)
    with pytest.raises(InvalidRequest, match=f"payload_bytes: 4096 is not the {PAYLOAD_BYTES}"):
        await running_node.connect(payload_bytes=4096)
    with pytest.raises(InvalidRequest, match=f"block_tokens: 16 is not the {BLOCK_TOKENS}"):
        await running_node.connect(block_tokens=16)
    assert await client.lookup(chain("a", 1)) == [False]


@pytest.mark.parametrize(
    ("payload_bytes", "block_tokens", "complaint"),
    [
        (1 << 20, 32, "dram_bytes: the node's 131172 hold no payload of 1048576 bytes"),
        (0, 32, "payload_bytes: 0; allowed are positive multiples of 4096"),
        (1000, 32, "payload_bytes: 1000; allowed are positive multiples of 4096"),
        (4096, 0, "block_tokens: 0; allowed is anything above 0"),
    ],
)
async def test_a_worker_whose_blocks_cannot_be_kept_is_refused_and_fixes_nothing(
    running_node: RunningNode, payload_bytes: int, block_tokens: int, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        await running_node.connect(payload_bytes, block_tokens)
    client = await running_node.connect()
    assert client.num_slots == NUM_SLOTS
    await client.close()


async def test_only_this_user_may_connect(running_node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(running_node.config.socket.stat().st_mode) == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreClosed):
        await running_node.connect()


async def test_connecting_to_nobody_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreClosed, match="no store node at"):
        await StoreClient.connect(
            tmp_path / "nothing", worker_id="w", incarnation="1", payload_bytes=4096, block_tokens=32
        )


_HELLO = pb.Hello(worker_id="w", payload_bytes=PAYLOAD_BYTES, block_tokens=BLOCK_TOKENS)


@pytest.mark.parametrize("admitted", [False, True], ids=["before hello", "after hello"])
@pytest.mark.parametrize(
    "rubbish",
    [
        frame(b"\xff\xff\xff"),
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        bytes(4),
        frame(pb.LocalRequest(request=1).SerializeToString()),
        frame(pb.LocalRequest(group=1, release=pb.Release()).SerializeToString())
        + frame(pb.LocalRequest(hello=_HELLO).SerializeToString()),
    ],
    ids=["no protobuf", "oversized", "empty", "no operation", "hello out of place"],
)
async def test_whoever_does_not_speak_the_protocol_is_cut_off_and_nobody_else(
    connect: Connect, running_node: RunningNode, rubbish: bytes, admitted: bool
) -> None:
    other = await connect()
    await _put(other, chain("a", 2))
    reader, writer = await asyncio.open_unix_connection(running_node.config.socket)
    if admitted:
        writer.write(frame(pb.LocalRequest(hello=_HELLO).SerializeToString()))
        await reader.readexactly(4)
    writer.write(rubbish)
    with contextlib.suppress(ConnectionResetError):
        await reader.read()  # to the end: the node closed it
    writer.close()
    assert await other.lookup(chain("a", 3)) == [True, True, False]
    assert (await running_node.status()).leased_blocks == 2


async def test_a_client_that_sends_in_pieces_is_understood(running_node: RunningNode) -> None:
    reader, writer = await asyncio.open_unix_connection(running_node.config.socket)
    for byte in frame(pb.LocalRequest(request=5, hello=_HELLO).SerializeToString()):
        writer.write(bytes([byte]))
        await writer.drain()
    length = int.from_bytes(await reader.readexactly(4), "little")
    reply = pb.LocalReply.FromString(await reader.readexactly(length))
    assert (reply.request, reply.welcome.num_slots) == (5, NUM_SLOTS)
    writer.close()


# ---- starting and stopping ------------------------------------------------------------------------------------------


def _mappings() -> list[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[4] for line in maps if "memfd:perigee-arena" in line]


def _arena_descriptors() -> list[Path]:
    descriptors = Path("/proc/self/fd").iterdir()
    return [fd for fd in descriptors if fd.is_symlink() and "perigee-arena" in str(fd.readlink())]


async def test_the_arena_is_one_piece_of_memory_and_nothing_of_it_stays(
    store_config: StoreConfig, hosted_directory: HostedDirectory
) -> None:
    gc.collect()  # what tests before have left of arenas
    serving = asyncio.create_task(node.run(store_config))
    (member,) = await hosted_directory.until(bool)
    running = RunningNode(store_config, member)
    first, second = await running.connect(), await running.connect()
    assert len(_mappings()) == 3 and len(set(_mappings())) == 1  # the node's and the clients', of one inode
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    await first.wait_closed()
    await asyncio.gather(first.close(), second.close())
    assert _mappings() == []
    assert _arena_descriptors() == []
    assert not store_config.socket.exists()
    await hosted_directory.until(lambda members: not members)


async def test_when_the_node_stops_whoever_waits_hears_it(
    store_config: StoreConfig, hosted_directory: HostedDirectory
) -> None:
    serving = asyncio.create_task(node.run(store_config))
    (member,) = await hosted_directory.until(bool)
    client = await RunningNode(store_config, member).connect()
    await client.group().acquire(chain("a", NUM_SLOTS), ROOT, 0.0)
    acquiring = asyncio.ensure_future(client.group().acquire(chain("b", 1), ROOT, WAIT_S))
    fetching = asyncio.ensure_future(anext(client.group().fetch(chain("a", 1), WAIT_S)))
    await client.lookup([])
    serving.cancel()
    for waiting in (acquiring, fetching):
        with pytest.raises(StoreClosed):
            await waiting
    await client.wait_closed()
    client.group().release()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_a_socket_that_a_dead_node_left_is_taken_over(
    store_config: StoreConfig, hosted_directory: HostedDirectory
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(store_config.socket))
    serving = asyncio.create_task(node.run(store_config))
    await hosted_directory.until(bool)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_a_socket_of_a_living_node_is_left_alone(connect: Connect, running_node: RunningNode) -> None:
    with pytest.raises(StoreError, match="another process listens"):
        await node.run(running_node.config)
    assert await (await connect()).lookup(chain("a", 1)) == [False]


async def test_a_file_where_the_socket_should_be_is_left_alone(store_config: StoreConfig) -> None:
    store_config.socket.write_text("precious")
    with pytest.raises(StoreError, match="is not a socket"):
        await node.run(store_config)
    assert store_config.socket.read_text() == "precious"


async def test_more_memory_than_there_is_is_not_promised(store_config: StoreConfig) -> None:
    greedy = store_config.model_copy(update={"dram_bytes": 1 << 50})
    with pytest.raises(StoreError, match=f"dram_bytes: {1 << 50}; "):
        await node.run(greedy)


async def test_an_address_that_is_taken_is_said(store_config: StoreConfig, running_node: RunningNode) -> None:
    taken = StoreConfig(
        socket=store_config.socket.with_name("other"),
        directory=store_config.directory,
        listen=running_node.member.address,
    )
    with pytest.raises(StoreError, match="listen: cannot listen on"):
        await node.run(taken)
    assert not taken.socket.exists()


# ---- watching -------------------------------------------------------------------------------------------------------


async def _storm(client: StoreClient, choose: random.Random) -> None:
    """A few hundred requests that store, hit and evict."""
    groups = [client.group() for _ in range(3)]
    for _ in range(200):
        index = choose.randrange(len(groups))
        with contextlib.suppress(NoRoom):
            acquired = await groups[index].acquire(chain(str(choose.randrange(6)), choose.randint(1, 8)), ROOT, 0.0)
            chosen = [reservation for reservation in acquired.reserved if choose.random() < 0.8]
            await groups[index].commit([payloads.write(client, reservation) for reservation in chosen])
        if choose.random() < 0.5:
            groups[index].release()
            groups[index] = client.group()


async def test_what_a_watcher_was_told_is_what_is_there(connect: Connect, running_node: RunningNode) -> None:
    client = await connect()
    await _put(client, chain("0", 3))
    known: set[bytes] = set()
    async with running_node.stub() as stub:
        watch = stub.Watch(pb.WatchRequest())
        messages = [await watch.read()]
        await asyncio.gather(_storm(client, random.Random(1)), _storm(await connect(), random.Random(2)))
        status = await stub.Status(pb.StatusRequest())
        while messages[-1].first_seq + len(messages[-1].events) < status.stored_total + status.evicted_total:
            messages.append(await watch.read())
        truth = await stub.Watch(pb.WatchRequest()).read()
    next_seq = 0
    for message in messages:
        assert message.snapshot == (next_seq == 0)
        assert message.first_seq == next_seq
        next_seq += len(message.events)
        for event in message.events:
            change = known.add if event.kind == pb.BlockEvent.STORED else known.remove
            change(event.key)
    assert status.evicted_total > 0
    assert truth.snapshot and {event.key for event in truth.events} == known


async def test_a_watcher_hears_of_the_slots_when_the_first_worker_fixes_them(
    connect: Connect, running_node: RunningNode
) -> None:
    async with running_node.stub() as stub:
        watch = stub.Watch(pb.WatchRequest())
        assert (await watch.read()).num_slots == 0
        await connect()
        resized = await watch.read()
        assert (resized.num_slots, resized.snapshot, len(resized.events)) == (NUM_SLOTS, False, 0)
        watch.cancel()


async def test_a_watcher_that_is_too_slow_is_told_to_start_again(
    store_config: StoreConfig, hosted_directory: HostedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "Feed", functools.partial(Feed, limit=0))
    serving = asyncio.create_task(node.run(store_config))
    (member,) = await hosted_directory.until(bool)
    running = RunningNode(store_config, member)
    client = await running.connect()
    async with running.stub() as stub:
        watch = stub.Watch(pb.WatchRequest())
        assert (await watch.read()).snapshot
        await _put(client, chain("a", 1))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
    assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await client.close()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
