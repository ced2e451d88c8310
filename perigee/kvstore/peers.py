"""The other nodes: where they serve their blocks, and the pulls from them that are under way."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection

from perigee.kvstore.driver import Driver
from perigee.kvstore.jobs import CancelPull, Pull
from perigee.kvstore.members import Member
from perigee.kvstore.moves import PulledBlock
from perigee.kvstore.transfer.base import PeerRefused, Transfer, TransferFailed, Wanted

_log = logging.getLogger(__name__)

_ATTEMPTS = 4  # without a block in between
_FIRST_BACKOFF_S = 0.05
_UNKNOWN_S = 2.0  # for which a node may be named before the directory has told us of it


class Peers:
    """The nodes that the directory tells of. `changed` is set, and replaced, whenever they are others."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}
        self.changed = asyncio.Event()

    async def follow(self, directory: AsyncIterator[Collection[Member]]) -> None:
        """Keeps up with the members of the cluster until cancelled."""
        async for members in directory:
            self.set(members)

    def set(self, members: Collection[Member]) -> None:
        self._addresses = {m.id: m.transfer_address for m in members if m.kind == "store" and m.transfer_address}
        self.changed.set()
        self.changed = asyncio.Event()

    def address(self, node_id: str) -> str | None:
        return self._addresses.get(node_id)

    async def appeared(self, node_id: str) -> str:
        """The address of a node, as soon as it is known."""
        while (address := self.address(node_id)) is None:
            await self.changed.wait()
        return address

    async def left(self, node_id: str, address: str) -> None:
        """Returns when the node is not at this address any more."""
        while self.address(node_id) == address:
            await self.changed.wait()


class Pulls:
    """Carries out the store's pulls over `transfer`, and again where a link broke, as long as that may help."""

    def __init__(self, transfer: Transfer, driver: Driver, peers: Peers) -> None:
        self._transfer = transfer
        self._driver = driver
        self._peers = peers
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def start(self, job: Pull) -> None:
        task = self._tasks[job.job] = asyncio.create_task(self._pull(job), name=f"pull {job.job} from {job.source}")
        task.add_done_callback(lambda ended: self._ended(job, ended))

    def cancel(self, job: CancelPull) -> None:
        if task := self._tasks.get(job.job):
            task.cancel()

    async def close(self) -> None:
        """Ends all pulls; when it returns no slot is written to any more."""
        for task in self._tasks.values():
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks.values())

    def _ended(self, job: Pull, task: "asyncio.Task[None]") -> None:
        del self._tasks[job.job]
        broken = not task.cancelled() and task.exception() is not None
        if broken:
            _log.warning("pull failed source=%s blocks=%d error=%s", job.source, len(job.expected), task.exception())
        self._driver.finish(self._driver.store.pull_ended(job.job, broken, self._driver.now))

    async def _pull(self, job: Pull) -> None:
        """Raises TransferFailed if the node cannot be reached, or has gone."""
        deadline = self._driver.now + job.wait_s
        address = await self._address(job)
        receiving = asyncio.ensure_future(self._receive_all(job, address, deadline))
        leaving = asyncio.ensure_future(self._peers.left(job.source, address))
        try:
            await asyncio.wait([receiving, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                raise TransferFailed(f"node {job.source!r} has left the cluster")
            await receiving
        finally:
            await _ended(receiving, leaving)

    async def _address(self, job: Pull) -> str:
        try:
            async with asyncio.timeout(min(_UNKNOWN_S, job.wait_s)):
                return await self._peers.appeared(job.source)
        except TimeoutError:
            raise TransferFailed(f"no node {job.source!r} in the cluster") from None

    async def _receive_all(self, job: Pull, address: str, deadline: float) -> None:
        """Receives what has not come yet, over as many links as it takes."""
        left = set(range(len(job.expected)))
        failures = 0
        while left:
            before = len(left)
            try:
                await self._receive(job, address, left, deadline)
                return
            except PeerRefused:
                raise
            except TransferFailed as error:
                failures = failures + 1 if len(left) == before else 1
                _log.info("pull interrupted source=%s left=%d error=%s", job.source, len(left), error)
                if failures == _ATTEMPTS:
                    raise
            await asyncio.sleep(_FIRST_BACKOFF_S * 2**failures)

    async def _receive(self, job: Pull, address: str, left: set[int], deadline: float) -> None:
        """Over one link. Takes out of `left` what came."""
        arena, store = self._driver.arena, self._driver.store
        wanted = [Wanted(i, job.expected[i].key, arena.payload(job.expected[i].slot)) for i in sorted(left)]
        wait_s = max(0.0, deadline - self._driver.now)
        async with contextlib.aclosing(self._transfer.pull(address, wanted, wait_s)) as received:
            async for block in received:
                left.remove(block.index)
                came = PulledBlock(block.index, block.num_tokens, block.origin)
                self._driver.finish(store.pulled(job.job, [came], self._driver.now))


async def _ended(*tasks: "asyncio.Future[None]") -> None:
    """Cancels what still runs, and waits until it has stopped: a receiver writes into slots until then."""
    for task in tasks:
        task.cancel()
    while pending := [task for task in tasks if not task.done()]:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(pending)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it is known already, or of no interest
