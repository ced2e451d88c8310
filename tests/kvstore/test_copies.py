"""Copies that the Conductor orders: a node pulls them for nobody, and drops them again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import BlockKey
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory, RunningNode
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import Pair, get, paired, put


async def replicate(pair: Pair, keys: list[BlockKey], source: str = "far") -> pb.Replicated:
    async with pair.near.stub() as stub:
        return await stub.Replicate(pb.ReplicateRequest(source=source, parent=ROOT, keys=keys))


async def trim(pair: Pair, keys: list[BlockKey]) -> int:
    async with pair.near.stub() as stub:
        return (await stub.Trim(pb.TrimRequest(keys=keys))).trimmed


@pytest.fixture
async def pair(tmp_path: Path, hosted_directory: HostedDirectory) -> AsyncIterator[Pair]:
    async with paired(tmp_path, hosted_directory) as pair:
        yield pair


async def test_a_replicated_prefix_is_here_and_leased_by_nobody(pair: Pair) -> None:
    keys = chain("a", 10)
    (await put(pair.there, keys)).release()
    assert await replicate(pair, keys) == pb.Replicated(pulled=10)
    assert [block.remote for block in await get(pair.here, keys)] == [False] * 10
    assert await replicate(pair, keys) == pb.Replicated()  # which is no reason to pull again
    status = await pair.near.status()
    assert (status.replicated_total, status.pulled_total, status.connections) == (10, 10, 1)
    assert (status.leased_blocks, status.reserved_blocks, status.orphaned_blocks) == (0, 0, 0)
    (await put(pair.here, chain("b", NUM_SLOTS))).release()  # copies make room as everything else does


async def test_what_the_other_node_lacks_is_missing_and_not_waited_for(pair: Pair) -> None:
    (await put(pair.there, chain("a", 3))).release()
    assert await replicate(pair, chain("a", 5)) == pb.Replicated(pulled=3, missing=2)
    assert await replicate(pair, chain("b", 2), source="nobody") == pb.Replicated(missing=2)


async def test_copies_take_no_room_from_those_who_use_theirs(pair: Pair) -> None:
    (await put(pair.there, chain("a", 4))).release()
    group = await put(pair.here, chain("b", NUM_SLOTS - 2))
    assert await replicate(pair, chain("a", 4)) == pb.Replicated(missing=4)
    group.release()
    assert await replicate(pair, chain("a", 4)) == pb.Replicated(pulled=4)


async def test_watchers_hear_of_copies_that_come_and_go(pair: Pair) -> None:
    keys = chain("a", 3)
    (await put(pair.there, keys)).release()
    async with pair.near.stub() as stub:
        events = aiter(stub.Watch(pb.WatchRequest()))
        assert (await anext(events)).snapshot
        told: set[bytes] = set()
        await replicate(pair, keys)
        while told != set(keys):
            told |= {event.key for event in (await anext(events)).events if event.kind == pb.BlockEvent.STORED}
        assert await trim(pair, keys) == 3
        while told:
            told -= {event.key for event in (await anext(events)).events if event.kind == pb.BlockEvent.REMOVED}
    status = await pair.near.status()
    assert (status.committed_blocks, status.trimmed_total, status.free_slots) == (0, 3, NUM_SLOTS)


async def test_what_a_worker_uses_is_not_trimmed(pair: Pair) -> None:
    keys = chain("a", 4)
    group = await put(pair.here, keys[:3])
    assert await trim(pair, keys) == 0
    group.release()
    assert await trim(pair, keys) == 3


@pytest.mark.parametrize(
    ("request_", "code", "named"),
    [
        (pb.ReplicateRequest(source="near", parent=ROOT), grpc.StatusCode.INVALID_ARGUMENT, "source"),
        (pb.ReplicateRequest(parent=ROOT), grpc.StatusCode.INVALID_ARGUMENT, "source"),
        (pb.ReplicateRequest(source="far"), grpc.StatusCode.INVALID_ARGUMENT, "parent"),
        (pb.ReplicateRequest(source="far", parent=ROOT, keys=[b"x"]), grpc.StatusCode.INVALID_ARGUMENT, "keys"),
        (
            pb.ReplicateRequest(source="far", parent=ROOT, keys=chain("a", NUM_SLOTS + 1)),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "slots",
        ),
        (pb.TrimRequest(keys=[b"x"]), grpc.StatusCode.INVALID_ARGUMENT, "keys"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    pair: Pair, request_: pb.ReplicateRequest | pb.TrimRequest, code: grpc.StatusCode, named: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=named) as refused:
        async with pair.near.stub() as stub:
            if isinstance(request_, pb.ReplicateRequest):
                await stub.Replicate(request_)
            else:
                await stub.Trim(request_)
    assert refused.value.code() is code


async def test_before_a_worker_has_said_what_a_block_is_there_is_nothing_to_copy(
    running_node: RunningNode,
) -> None:
    async with running_node.stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="no worker"):
            await stub.Trim(pb.TrimRequest())


async def test_two_calls_for_the_same_blocks_share_one_pull(pair: Pair) -> None:
    keys = chain("a", 8)
    (await put(pair.there, keys)).release()
    await asyncio.gather(replicate(pair, keys), replicate(pair, keys))
    assert (await pair.far.status()).served_total == 8
    assert await pair.here.lookup(keys) == [True] * 8
