"""Store nodes with SSD tiers and peers, in the test's event loop, and what their workers do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from perigee.kvstore import node
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.client import LeasedBlock, LeaseGroup, StoreClient
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.peers import Peers
from tests.kvstore import payloads
from tests.kvstore.conftest import NUM_SLOTS, PAYLOAD_BYTES, HostedDirectory, RunningNode
from tests.kvstore.keys import ROOT

WAIT_S = 60.0  # for what must come; nothing here waits that long


def config_of(
    directory: HostedDirectory, folder: Path, name: str, *, ssd: bool = False, **fields: object
) -> StoreConfig:
    """A node with `NUM_SLOTS` slots and, with `ssd`, room for some hundred records in `folder`/`name`."""
    if ssd:
        (folder / name).mkdir(exist_ok=True)
    values = {
        "id": name,
        "socket": folder / f"{name}.sock",
        "directory": directory.target,
        "dram_bytes": NUM_SLOTS * PAYLOAD_BYTES,
        "ssd_folder": folder / name if ssd else None,
        "ssd_bytes": 2 << 20,
        "free_share": 0.5,
        **fields,
    }
    return StoreConfig.model_validate(values)


@dataclass(frozen=True)
class Neighbour(RunningNode):
    """A node among others, and whom of them it knows."""

    peers: Peers


async def acquainted(one: Neighbour, other: Neighbour) -> None:
    """Returns when each knows the other: who has joined is heard of by the directory first, and by the nodes later."""
    await asyncio.gather(one.peers.appeared(other.config.id), other.peers.appeared(one.config.id))


@contextlib.asynccontextmanager
async def running(config: StoreConfig, directory: HostedDirectory) -> AsyncIterator[Neighbour]:
    """A node that has joined, and has left again afterwards."""
    peers = Peers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "Peers", lambda: peers)
        serving = asyncio.create_task(node.run(config))
        joining = asyncio.create_task(directory.until(lambda members: config.id in {member.id for member in members}))
        await asyncio.wait([serving, joining], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        joining.cancel()
        serving.result()
    (member,) = [member for member in joining.result() if member.id == config.id]
    try:
        yield Neighbour(config, member, peers)
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await directory.until(lambda members: config.id not in {member.id for member in members})


async def put(client: StoreClient, keys: Sequence[BlockKey], parent: BlockKey = ROOT) -> LeaseGroup:
    """Commits what is not there; the group has it all leased."""
    group = client.group()
    acquired = await group.acquire(keys, parent, WAIT_S)
    await group.commit([payloads.write(client, reservation) for reservation in acquired.reserved])
    return group


async def get(
    client: StoreClient, keys: Sequence[BlockKey], source: str = "", wait_s: float = WAIT_S
) -> list[LeasedBlock]:
    """All blocks, by index, checked to the last byte. Raises BlocksMissing."""
    group = client.group()
    try:
        blocks = [block async for batch in group.fetch(keys, wait_s, source, ROOT) for block in batch]
        assert all(payloads.is_intact(client.payload(block.slot), block.index) for block in blocks)
    finally:
        group.release()
    return sorted(blocks, key=lambda block: block.index)


@dataclass(frozen=True)
class Pair:
    """Two nodes with a worker each."""

    near: Neighbour
    far: Neighbour
    here: StoreClient
    there: StoreClient

    async def assert_at_rest(self) -> None:
        for each in (self.near, self.far):
            status = await each.status()
            assert (status.leased_blocks, status.reserved_blocks, status.orphaned_blocks) == (0, 0, 0)


@contextlib.asynccontextmanager
async def paired(folder: Path, directory: HostedDirectory) -> AsyncIterator[Pair]:
    """Nodes that know each other as near and far."""
    async with contextlib.AsyncExitStack() as nodes:
        near, far = [
            await nodes.enter_async_context(running(config_of(directory, folder, name), directory))
            for name in ("near", "far")
        ]
        await acquainted(near, far)
        here, there = await near.connect(), await far.connect()
        yield Pair(near, far, here, there)
        await asyncio.gather(here.close(), there.close())
