"""A node with an SSD and a peer under random load, and what must hold when it is over."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from perigee.kvstore.client import BlocksMissing, NoRoom, StoreClient
from perigee.kvstore.messages import LeasedBlock
from tests.kvstore import payloads
from tests.kvstore.conftest import HostedDirectory
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import config_of, running

SECONDS = float(os.environ.get("PERIGEE_SOAK_S", "60"))


async def _work(client: StoreClient, source: str, seed: int) -> int:
    """Puts, gets and abandons for a while. Returns how many blocks it has read, each of them intact."""
    choose = random.Random(seed)
    loop = asyncio.get_running_loop()
    until, num_read = loop.time() + SECONDS, 0
    while loop.time() < until:
        keys = chain(f"prompt {choose.randrange(20)}", choose.randint(1, 6))
        group = client.group()
        try:
            if choose.random() < 0.5:
                acquired = await group.acquire(keys, ROOT, choose.choice([0.0, 0.2]))
                num_read += _check(client, acquired.leased)
                written = [payloads.write(client, r) for r in acquired.reserved if choose.random() < 0.9]
                await group.commit(written)
            else:
                async for blocks in group.fetch(keys, choose.choice([0.0, 0.05]), choose.choice(["", source]), ROOT):
                    num_read += _check(client, blocks)
        except (NoRoom, BlocksMissing):
            pass
        finally:
            group.release()
    return num_read


def _check(client: StoreClient, blocks: tuple[LeasedBlock, ...]) -> int:
    assert all(payloads.is_intact(client.payload(block.slot), block.index) for block in blocks)
    return len(blocks)


@pytest.mark.slow
async def test_after_a_minute_of_anything_nothing_is_held_and_nothing_was_wrong(
    tmp_path: Path, hosted_directory: HostedDirectory
) -> None:
    one, two = (config_of(hosted_directory, tmp_path, name, ssd=True, ssd_bytes=600_000) for name in ("one", "two"))
    async with running(one, hosted_directory) as first, running(two, hosted_directory) as second:
        clients = [(await node.connect(), source) for node, source in ((first, "two"), (second, "one")) * 3]
        counts = await asyncio.gather(*(_work(client, source, n) for n, (client, source) in enumerate(clients)))
        assert all(counts)
        for client, _ in clients:
            await client.close()
        for node in (first, second):
            while (status := await node.status()).connections or status.leased_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (status.orphaned_blocks, status.ssd_corrupt_total, status.remote_corrupt_total) == (0, 0, 0)
            assert min(status.ssd_loaded_total, status.ssd_spilled_total, status.pulled_total) > 0
