"""A node's door for other nodes that pull its blocks."""

import asyncio
import functools
import logging
import socket
from concurrent.futures import ThreadPoolExecutor

from perigee.kvstore.accepting import accept
from perigee.kvstore.addresses import join
from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import listening
from perigee.kvstore.transfer.base import BlockSource, TransferFailed
from perigee.kvstore.transfer.handshake import admit, tune
from perigee.kvstore.transfer.serving import Limits, Segment, Served, ServedPeer, Service

_log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0


class TransferServer:
    """Serves blocks of `source` to whoever knows `secret`. Listens from the start; who connects before `serve` waits.

    Control runs in the event loop, as does the store; payloads are sent by threads, straight from the slots. At most
    `max_connections` peers are let in at a time; more have to wait. `segment` is for peers that read memory directly.
    Raises StoreError if it cannot listen on `listen`, or must not: without a secret, loopback only.
    """

    def __init__(
        self,
        node_id: str,
        listen: str,
        source: BlockSource,
        *,
        secret: bytes = b"",
        limits: Limits | None = None,
        max_connections: int = 256,
        segment: Segment | None = None,
    ) -> None:
        self.served = Served()
        self._node_id = node_id
        self._secret = secret
        self._listener = listening.listen(listen, authenticated=bool(secret))
        self._room = asyncio.Semaphore(max_connections)
        self._threads = ThreadPoolExecutor(max_connections, "perigee-send")
        self._service = Service(source, limits or Limits(), self._threads, self.served, segment)

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        host, port = self._listener.getsockname()[:2]
        return join(host, port)

    async def serve(self) -> None:
        """Serves until cancelled; then every connection is ended, and every lease."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._room.acquire()
                connection, peer = await accept(self._listener, self._node_id)
                task = tasks.create_task(self._serve(connection, join(*peer[:2])))
                task.add_done_callback(functools.partial(self._leave, connection))

    def close(self) -> None:
        """Stops listening. To be called once `serve` has ended."""
        self._listener.close()
        self._threads.shutdown()

    async def _serve(self, connection: socket.socket, peer: str) -> None:
        try:
            await self._admit(connection)
            _log.info("peer connected node=%s peer=%s", self._node_id, peer)
            await ServedPeer(connection, self._service).serve()
        except (MalformedFrame, TransferFailed, TimeoutError) as error:
            _log.warning("peer cut off node=%s peer=%s error=%s", self._node_id, peer, str(error) or "timeout")
        except (OSError, EOFError) as error:
            _log.info("peer disconnected node=%s peer=%s reason=%s", self._node_id, peer, error)

    def _leave(self, connection: socket.socket, _: "asyncio.Task[None]") -> None:
        """Also where a task was cancelled before it began."""
        connection.close()
        self._room.release()

    async def _admit(self, connection: socket.socket) -> None:
        tune(connection)
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            await admit(connection, self._secret)
