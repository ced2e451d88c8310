"""Connections to a listening socket, one by one."""

import asyncio
import logging
import socket
from typing import Any

_log = logging.getLogger(__name__)

_RETRY_S = 0.1


async def accept(listener: socket.socket, node_id: str) -> tuple[socket.socket, Any]:
    """The next connection, which the caller owns, and the address of who connected.

    Unlike the event loop's own it never accepts one that nobody gets, when it is cancelled at that moment.
    """
    while True:
        await readable(listener)
        try:
            connection, peer = listener.accept()
        except BlockingIOError:  # who connected has gone again
            continue
        except OSError as error:  # out of descriptors: whoever connects has to wait for some
            _log.warning("cannot accept node=%s error=%s", node_id, error)
            await asyncio.sleep(_RETRY_S)
        else:
            connection.setblocking(False)
            return connection, peer


async def readable(waited: socket.socket) -> None:
    """Returns once there is something to receive or to accept, or the other side has gone."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(waited, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(waited)
