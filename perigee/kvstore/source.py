"""This node's blocks for other nodes: what they are leased by, over the same store as the workers' requests."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.driver import Driver
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Fetched, LeasedBlock
from perigee.kvstore.transfer.base import SourceBlock
from perigee.kvstore.waiting import Caller, Result


class StoreSource:
    """A `BlockSource`. Each lease is a connection of its own, so its end is the end of all that it holds.

    `opened` waits for the store, which is there once a worker has said what a block is.
    """

    def __init__(self, opened: Callable[[], Awaitable[Driver]]) -> None:
        self._opened = opened

    async def lease(self, keys: Sequence[BlockKey], wait_s: float) -> AsyncGenerator[tuple[SourceBlock, ...], None]:
        """See `BlockSource`. What is on SSD is loaded."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        try:
            async with asyncio.timeout(wait_s):
                driver = await self._opened()
        except TimeoutError:
            return
        results: asyncio.Queue[Result] = asyncio.Queue()
        connection = driver.connect(lambda _, result: results.put_nowait(result))
        try:
            self._ask(driver, connection, keys, deadline - loop.time())
            async for fetched in _fetched(results):
                if fetched.blocks:
                    yield tuple(_source_block(driver, block) for block in fetched.blocks)
        finally:
            driver.disconnect(connection)

    def _ask(self, driver: Driver, connection: int, keys: Sequence[BlockKey], wait_s: float) -> None:
        caller = Caller(GroupId(connection, 1), 1)
        driver.finish(driver.store.fetch(caller, keys, wait_s, driver.now))


async def _fetched(results: "asyncio.Queue[Result]") -> AsyncGenerator[Fetched, None]:
    """The answers to a fetch, which may be refused."""
    while isinstance(fetched := await results.get(), Fetched):
        yield fetched
        if fetched.done:
            return


def _source_block(driver: Driver, block: LeasedBlock) -> SourceBlock:
    return SourceBlock(block.index, block.num_tokens, block.origin, driver.arena.payload(block.slot))
