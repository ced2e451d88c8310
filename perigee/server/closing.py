"""The end of the server: what still runs when its grace period is over is told so, and ends by itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.server.errors import Unavailable


class Closing:
    """Turns the end of the grace period into an error of every request that still runs."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._is_over = False

    def end(self) -> None:
        """Ends everything that runs in `guarded`, now and later."""
        self._is_over = True
        for timeout in self._running:
            timeout.reschedule(0)

    @asynccontextmanager
    async def guarded(self) -> AsyncIterator[None]:
        """Raises Unavailable in place of what runs in the context once `end` was called."""
        timeout = asyncio.timeout_at(0 if self._is_over else None)
        try:
            async with timeout:
                self._running.add(timeout)
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise Unavailable("this server is shutting down") from None
        finally:
            self._running.discard(timeout)
