"""The server's streams to the workers: one to each, opened when first needed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from perigee.kvstore.access import OPEN, Access
from perigee.scheduler import scheduler_pb2 as pb
from perigee.workers.client import WorkerClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Connection:
    incarnation: str
    client: WorkerClient


class WorkerPool:
    """Finds the stream to a worker, and opens a new one when the worker has started anew or the stream broke."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._connections: dict[str, _Connection] = {}
        self._opening = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def opened(cls, access: Access = OPEN) -> AsyncIterator["WorkerPool"]:
        """A pool whose streams are all closed when the context is left."""
        pool = cls(access)
        try:
            yield pool
        finally:
            for connection in pool._connections.values():
                await connection.client.close()

    async def get(self, worker: pb.WorkerAddress) -> WorkerClient:
        """The stream to this incarnation of the worker. One that cannot be reached shows itself as WorkerLost later."""
        if usable := self._usable(worker):
            return usable
        async with self._opening:
            return self._usable(worker) or await self._open(worker)

    def _usable(self, worker: pb.WorkerAddress) -> WorkerClient | None:
        connection = self._connections.get(worker.id)
        if connection is None or connection.client.closed or connection.incarnation != worker.incarnation:
            return None
        return connection.client

    async def _open(self, worker: pb.WorkerAddress) -> WorkerClient:
        if stale := self._connections.pop(worker.id, None):
            await stale.client.close()
        client = await WorkerClient.connect(worker.id, worker.address, self._access)
        self._connections[worker.id] = _Connection(worker.incarnation, client)
        logger.info(
            "worker attached worker=%s incarnation=%s address=%s", worker.id, worker.incarnation, worker.address
        )
        return client
