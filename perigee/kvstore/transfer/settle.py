"""Waiting for threads that use memory which is not theirs."""

import asyncio
import contextlib
import socket


async def settle(future: "asyncio.Future[None]") -> None:
    """Returns when `future` is done, and not before, however often the waiting is cancelled; then raises that.

    How the future ended is its owner's to look at, or not: an error that nobody looks at is not reported.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if not future.cancelled():
        future.exception()
    if cancelled:
        raise cancelled


def shut_down(connection: socket.socket) -> None:
    """Ends a connection under the thread that uses it, which gets an error or the end of the stream at once."""
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)
