"""What a Perigee endpoint tells of itself while requests are sent to it: what its workers carry, once a second, and the
receipt of each request that has ended, one after the other.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TypeVar

import aiohttp
from pydantic import BaseModel

from perigee.replay.client import Clock
from perigee.replay.documents import Cluster, Receipt
from perigee.replay.metrics import RequestRecord
from perigee.replay.series import State
from perigee.replay.shadow_report import Judged, ShadowReport, compare
from perigee.scheduler.policies import PolicyNames

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)

# How long a run that is over waits for the receipts that were not read yet.
_PATIENCE_S = 30.0

_Document = TypeVar("_Document", bound=BaseModel)


class Observer:
    """Of one run: told of each record as it ends, it keeps them in `records`, completed by their receipts. `states`
    are what the workers carried. Questions that get no answer are passed over.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, begun: Cluster) -> None:
        """`begun` is what the endpoint told before the run."""
        self.records: list[RequestRecord] = []
        self.states: list[State] = []
        self._session = session
        self._url = url.rstrip("/")
        self._first = self._last = begun
        self._unread: asyncio.Queue[int] = asyncio.Queue()  # places in `records`
        self._judged: list[Judged] = []
        self._policies: PolicyNames | None = None

    @classmethod
    async def of(cls, session: aiohttp.ClientSession, url: str) -> "Observer | None":
        """None if the endpoint tells nothing of a cluster, as others than Perigee's do."""
        cluster = await _get(session, f"{url.rstrip('/')}/cluster", Cluster)
        if cluster is None:
            logger.info("endpoint tells nothing of its cluster url=%s", url)
            return None
        return cls(session, url, cluster)

    @asynccontextmanager
    async def observing(self, clock: Clock) -> AsyncIterator[None]:
        """Looks until the context is left. Unless that is by an exception, all is read to its end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = [tasks.create_task(work) for work in (self._keep_looking(clock), self._read_receipts())]
                yield
                await self._look(clock)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_S):
                        await self._unread.join()
                for task in watching:
                    task.cancel()
        finally:
            if unread := self._unread.qsize():
                logger.warning("receipts were not read url=%s requests=%d", self._url, unread)

    def ended(self, record: RequestRecord) -> None:
        """One more request has ended."""
        self.records.append(record)
        if record.request_id:
            self._unread.put_nowait(len(self.records) - 1)

    @property
    def shadow(self) -> ShadowReport | None:
        """What a shadow would have done; None if there is none, or nothing was decided."""
        sums, first = self._last.shadow, self._first.shadow
        if sums is None or first is None or self._policies is None:
            return None
        return compare(self._policies, sums.names, self._judged, sums.second.since(first.second))

    async def _keep_looking(self, clock: Clock) -> None:
        while True:
            await self._look(clock)
            await asyncio.sleep(_PERIOD_S - clock() % _PERIOD_S)

    async def _look(self, clock: Clock) -> None:
        cluster = await _get(self._session, f"{self._url}/cluster", Cluster)
        if cluster is not None:
            self._last = cluster
            self.states.append(cluster.state(clock()))

    async def _read_receipts(self) -> None:
        while True:
            index = await self._unread.get()
            record = self.records[index]
            receipt = await _get(self._session, f"{self._url}/requests/{record.request_id}/receipt", Receipt)
            if receipt is not None:
                self.records[index] = replace(record, cached_by_tier=receipt.cached_by_tier)
                self._judged += receipt.judged
                self._policies = receipt.policies
            self._unread.task_done()


async def _get(session: aiohttp.ClientSession, url: str, kind: type[_Document]) -> _Document | None:
    """None if there is no answer, or another one than a document of this kind."""
    try:
        async with session.get(url, raise_for_status=True, timeout=_TIMEOUT) as response:
            return kind.model_validate_json(await response.read())
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        logger.debug("no answer url=%s error=%s", url, error)
        return None
