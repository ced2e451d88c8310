"""Copies of other nodes' blocks that nobody here has asked for: the node fetches them itself and keeps none leased."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.driver import Driver
from perigee.kvstore.errors import StoreError
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Fetched
from perigee.kvstore.waiting import Caller, Result, check_parent


class Replicated(NamedTuple):
    """How many blocks came from the other node, and how many neither came nor were here."""

    pulled: int
    missing: int


async def replicate(driver: Driver, source: str, keys: Sequence[BlockKey], parent: BlockKey) -> Replicated:
    """Pulls those of `keys`, which follow `parent` and each other, that are not here from the node `source`.

    It has no patience: what `source` does not have, and what there is no room for now, is missing. Cancelling it ends
    the pull. Raises InvalidRequest, and TooLarge for more than the arena could hold.
    """
    check_parent(parent, keys)
    results: asyncio.Queue[Result] = asyncio.Queue()
    # A connection of its own: what it leases while it pulls goes with it.
    connection = driver.connect(lambda _, result: results.put_nowait(result))
    try:
        caller = Caller(GroupId(connection, 1), 1)
        driver.finish(driver.store.fetch(caller, keys, 0.0, driver.now, source, parent))
        replicated = await _outcome(results)
    finally:
        driver.disconnect(connection)
    driver.store.totals.replicated_blocks += replicated.pulled
    return replicated


async def _outcome(results: "asyncio.Queue[Result]") -> Replicated:
    pulled = 0
    while isinstance(result := await results.get(), Fetched):
        pulled += sum(block.remote for block in result.blocks)
        if result.done:
            return Replicated(pulled, len(result.missing))
    assert isinstance(result, StoreError)
    raise result
