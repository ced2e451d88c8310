"""Two nodes: blocks of one are pulled by the other, over links that may break, from nodes that may go."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.client import BlocksMissing, QuotaExceeded
from tests.kvstore import payloads
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import WAIT_S, Pair, config_of, get, paired, put, running


@pytest.fixture
async def pair(tmp_path: Path, hosted_directory: HostedDirectory) -> AsyncIterator[Pair]:
    async with paired(tmp_path, hosted_directory) as pair:
        yield pair


async def test_blocks_are_pulled_whole_and_are_here_then(pair: Pair) -> None:
    keys = chain("a", 10)
    (await put(pair.there, keys)).release()
    assert [block.remote for block in await get(pair.here, keys, "far")] == [True] * 10
    assert [block.remote for block in await get(pair.here, keys, "far")] == [False] * 10
    assert ((await pair.near.status()).pulled_total, (await pair.far.status()).served_total) == (10, 10)
    await pair.assert_at_rest()


async def test_a_pull_gets_blocks_as_they_are_committed_on_the_other_node(pair: Pair) -> None:
    keys = chain("a", 3)
    writing = pair.there.group()
    acquired = await writing.acquire(keys, ROOT, 0.0)
    group = pair.here.group()
    fetch = group.fetch(keys, WAIT_S, "far", ROOT)
    for reservation in acquired.reserved:
        await writing.commit([payloads.write(pair.there, reservation)])
        (block,) = await anext(fetch)
        assert (block.index, block.remote) == (reservation.index, True)
        assert payloads.is_intact(pair.here.payload(block.slot), block.index)
    writing.release()
    group.release()


async def test_many_who_want_the_same_blocks_at_once_share_one_pull(pair: Pair) -> None:
    keys = chain("a", 8)
    waiting = [asyncio.ensure_future(get(pair.here, keys, "far")) for _ in range(5)]
    (await put(pair.there, keys)).release()
    for blocks in await asyncio.gather(*waiting):
        assert [block.index for block in blocks] == list(range(8))
    assert (await pair.far.status()).served_total == 8


async def test_without_patience_comes_what_the_other_node_has(pair: Pair) -> None:
    (await put(pair.there, chain("a", 3))).release()
    with pytest.raises(BlocksMissing) as missing:
        await get(pair.here, chain("a", 5), "far", wait_s=0.0)
    assert missing.value.indices == (3, 4)
    await pair.assert_at_rest()


async def test_nobody_waits_for_a_node_that_has_left(tmp_path: Path, hosted_directory: HostedDirectory) -> None:
    async with running(config_of(hosted_directory, tmp_path, "near"), hosted_directory) as near:
        here = await near.connect()
        async with running(config_of(hosted_directory, tmp_path, "far"), hosted_directory) as far:
            there = await far.connect()
            waiting = asyncio.ensure_future(get(here, chain("a", 4), "far"))
            (await put(there, chain("a", 2))).release()
            await there.close()
        with pytest.raises(BlocksMissing):
            await waiting
        assert (await near.status()).reserved_blocks == 0
        await here.close()


async def test_who_gives_up_ends_the_pull_and_its_slots_are_free(pair: Pair) -> None:
    group = pair.here.group()
    waiting = asyncio.ensure_future(anext(group.fetch(chain("a", NUM_SLOTS), WAIT_S, "far")))
    await pair.here.lookup([])
    assert (await pair.near.status()).reserved_blocks == NUM_SLOTS
    acquiring = asyncio.ensure_future(pair.here.group().acquire(chain("b", NUM_SLOTS), ROOT, WAIT_S))
    group.release()
    assert len((await acquiring).reserved) == NUM_SLOTS
    with pytest.raises(BlocksMissing):
        await waiting


async def test_pins_keep_blocks_up_to_a_quota_until_they_end(pair: Pair) -> None:
    keys = chain("a", 6)
    (await put(pair.here, keys)).release()
    assert await pair.here.pin("tenant", [keys[0], *chain("x", 1)], 60.0) == [True, False]
    with pytest.raises(QuotaExceeded, match="allowed are 4"):
        await pair.here.pin("tenant", keys[:5], 60.0)
    async with pair.near.stub() as stub:
        pinned = await stub.Pin(pb.Pin(tenant="tenant", keys=keys[:4], ttl_s=60.0))
        assert list(pinned.pinned) == [True] * 4
        with pytest.raises(grpc.aio.AioRpcError, match="allowed are 4"):
            await stub.Pin(pb.Pin(tenant="tenant", keys=keys[:5], ttl_s=60.0))
    (await put(pair.here, chain("b", NUM_SLOTS - 4))).release()
    assert await pair.here.lookup(keys) == [True] * 4 + [False] * 2
    await pair.here.unpin("tenant", keys)
    (await put(pair.here, chain("c", NUM_SLOTS))).release()
    await pair.assert_at_rest()
