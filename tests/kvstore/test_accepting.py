"""Connections and whoever waits for them, when the waiting ends at the wrong moment."""

import asyncio
import contextlib
import socket

import pytest

from perigee.kvstore.accepting import accept


@pytest.mark.parametrize("turns", range(5))
async def test_who_is_cancelled_as_somebody_connects_leaves_the_connection_to_the_next(turns: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setblocking(False)
        waiting = asyncio.ensure_future(accept(listener, "node"))
        await asyncio.sleep(0)
        client.connect(listener.getsockname())
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        accepted = waiting if not waiting.cancelled() else asyncio.ensure_future(accept(listener, "node"))
        connection, peer = await accepted
        assert peer == client.getsockname()
        connection.close()
