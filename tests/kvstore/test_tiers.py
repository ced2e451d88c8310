"""A node with an SSD: blocks that leave memory come back, over restarts too, and doubt is a miss."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.client import BlocksMissing, StoreClient
from perigee.kvstore.messages import Tier
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory, RunningNode
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import WAIT_S, config_of, get, put, running

COLD = chain("cold", 6)
_KEY_OFFSET = 56  # in a record's header block


@pytest.fixture
async def spilled(tmp_path: Path, hosted_directory: HostedDirectory) -> AsyncIterator[tuple[RunningNode, StoreClient]]:
    """A node on whose SSD, and nowhere else, the blocks `COLD` are."""
    async with running(config_of(hosted_directory, tmp_path, "node", ssd=True), hosted_directory) as node:
        client = await node.connect()
        await push_out(node, client)
        yield node, client
        await client.close()


async def push_out(node: RunningNode, client: StoreClient) -> None:
    """Puts `COLD`, uses it again, which makes it worth a write, and then enough other blocks that it must go.

    Only what is free is taken, so that nothing is dropped because the disk takes long.
    """
    for _ in range(2):
        (await put(client, COLD)).release()
    for number in range(6):
        (await put(client, chain(f"filler {number}", 4))).release()
        await _quarter_is_free(node)
    held = []
    for number in range(4):
        await _quarter_is_free(node)
        held.append(await put(client, chain(f"all {number}", NUM_SLOTS // 4)))
    for group in held:
        group.release()


async def _quarter_is_free(node: RunningNode) -> None:
    while (await node.status()).free_slots < NUM_SLOTS // 4:
        pass


async def test_what_left_memory_is_read_from_ssd_and_is_in_memory_then(
    spilled: tuple[RunningNode, StoreClient],
) -> None:
    node, client = spilled
    assert await client.lookup(COLD) == [True] * 6
    assert [block.tier for block in await get(client, COLD)] == [Tier.SSD] * 6
    assert [block.tier for block in await get(client, COLD)] == [Tier.DRAM] * 6
    status = await node.status()
    assert (status.ssd_state, status.ssd_loaded_total) == (pb.SSD_ON, 6)
    assert status.ssd_spilled_total >= 6
    assert (status.orphaned_blocks, status.leased_blocks, status.reserved_blocks) == (0, 0, 0)


async def test_an_acquire_leases_what_is_on_ssd_and_reserves_the_rest(
    spilled: tuple[RunningNode, StoreClient],
) -> None:
    node, client = spilled
    acquired = await client.group().acquire([*COLD, *chain("new", 2)], ROOT, 0.0)
    assert [(block.index, block.tier) for block in acquired.leased] == [(i, Tier.SSD) for i in range(6)]
    assert [reservation.index for reservation in acquired.reserved] == [6, 7]
    assert (await node.status()).ssd_hit_blocks_total == 6


async def test_a_corrupt_record_is_a_miss_and_the_blocks_before_it_are_hits(
    spilled: tuple[RunningNode, StoreClient], tmp_path: Path
) -> None:
    node, client = spilled
    damage(tmp_path / "node", COLD[3])
    acquired = await client.group().acquire(COLD, ROOT, WAIT_S)
    assert [block.index for block in acquired.leased] == [0, 1, 2]
    assert [reservation.index for reservation in acquired.reserved] == [3, 4, 5]
    assert (await client.lookup(COLD))[3] is False
    status = await node.status()
    assert (status.ssd_corrupt_total, status.ssd_state) == (1, pb.SSD_ON)


async def test_a_fetch_without_patience_misses_only_what_is_corrupt(
    spilled: tuple[RunningNode, StoreClient], tmp_path: Path
) -> None:
    _, client = spilled
    damage(tmp_path / "node", COLD[2])
    with pytest.raises(BlocksMissing) as missing:
        await get(client, COLD, wait_s=0.0)
    assert missing.value.indices == (2,)


async def test_after_a_restart_watchers_hear_of_what_is_on_ssd_and_workers_get_it(
    tmp_path: Path, hosted_directory: HostedDirectory
) -> None:
    config = config_of(hosted_directory, tmp_path, "node", ssd=True)
    async with running(config, hosted_directory) as node:
        client = await node.connect()
        await push_out(node, client)
        await client.close()
    async with running(config, hosted_directory) as node, node.stub() as stub:
        watch = stub.Watch(pb.WatchRequest())
        assert not (await watch.read()).events
        client = await node.connect()
        told = {(event.tier, event.key) for event in (await watch.read()).events}
        assert {(pb.SSD, key) for key in COLD} <= told
        assert [block.tier for block in await get(client, COLD)] == [Tier.SSD] * 6
        watch.cancel()
        await client.close()


@pytest.mark.parametrize("why", ["missing", "a file", "too small"])
async def test_without_a_usable_folder_the_node_serves_from_memory_and_says_so(
    tmp_path: Path, hosted_directory: HostedDirectory, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    if why == "a file":
        folder.write_text("precious")
    if why == "too small":
        folder.mkdir()
    config = config_of(
        hosted_directory, tmp_path, "node", ssd_folder=folder, ssd_bytes=4096 if why == "too small" else 2 << 20
    )
    async with running(config, hosted_directory) as node:
        client = await node.connect()
        await put(client, chain("a", 3))
        assert len(await get(client, chain("a", 3))) == 3
        assert (await node.status()).ssd_state == pb.SSD_FAILED
        await client.close()
    assert "ssd tier off, serving goes on without it" in caplog.text


def damage(folder: Path, key: bytes) -> None:
    """Flips a bit somewhere in the payload of every record of `key`."""
    damaged = 0
    for path in folder.glob("segment-*"):
        data = bytearray(path.read_bytes())
        for header in range(0, len(data), 4096):
            if data[header + _KEY_OFFSET :][:32] == key:
                data[header + 4096 + random.Random(header).randrange(4096)] ^= 1
                damaged += 1
        path.write_bytes(data)
    assert damaged
