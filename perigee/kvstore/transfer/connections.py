"""The pulling side's connections: made with backoff, authenticated, and kept for the next pull."""

import asyncio
import contextlib
import logging
import select
import socket

from perigee.kvstore.addresses import join
from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import listening
from perigee.kvstore.transfer.base import PeerRefused, TransferFailed
from perigee.kvstore.transfer.handshake import greet, tune

_log = logging.getLogger(__name__)

_IDLE_PER_PEER = 4
_ATTEMPT_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 1.0


class Connections:
    """Authenticated connections to peers by address. Owns those that nobody uses; who takes one owns it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._idle: dict[str, list[socket.socket]] = {}

    async def take(self, peer: str, wait_s: float) -> socket.socket:
        """A connection without a timeout on it. Tries again for `wait_s` seconds while the peer cannot be reached.

        Raises TransferFailed, and PeerRefused at once.
        """
        while idle := self._idle.get(peer):
            connection = idle.pop()
            if not _has_ended(connection):
                return connection
            connection.close()
        try:
            host, port = listening.split(peer)
        except ValueError as error:
            raise TransferFailed(f"peer: {error}") from error
        return await self._connect_with_backoff(host, port, wait_s)

    def give_back(self, peer: str, connection: socket.socket) -> None:
        """For the next pull. Only where the last one was answered to its end."""
        idle = self._idle.setdefault(peer, [])
        if len(idle) < _IDLE_PER_PEER:
            idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Closes the idle connections."""
        for connection in [connection for idle in self._idle.values() for connection in idle]:
            connection.close()
        self._idle.clear()

    async def _connect_with_backoff(self, host: str, port: int, wait_s: float) -> socket.socket:
        loop = asyncio.get_running_loop()
        address = join(host, port)
        deadline, backoff_s = loop.time() + wait_s, _FIRST_BACKOFF_S
        while True:
            try:
                return await self._connect(host, port)
            except PeerRefused as error:
                _log.warning("peer refused peer=%s error=%s", address, error)
                raise
            except (OSError, EOFError, MalformedFrame) as error:
                if loop.time() + backoff_s > deadline:
                    raise TransferFailed(f"cannot reach {address!r}: {str(error) or 'timeout'}") from error
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _connect(self, host: str, port: int) -> socket.socket:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_ATTEMPT_TIMEOUT_S):
            family, _, _, _, resolved = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
            with contextlib.ExitStack() as undo:
                connection = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
                connection.setblocking(False)
                tune(connection)
                await loop.sock_connect(connection, resolved)
                await greet(connection, self._secret)
                undo.pop_all()
        _log.info("connected to peer=%s", join(host, port))
        return connection


def _has_ended(connection: socket.socket) -> bool:
    """Whether there is anything to read where nothing was asked: the end of the stream, or nonsense."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
