"""Pulling blocks from other nodes over TCP, each payload received straight into its slot."""

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from perigee.kvstore.errors import InvalidRequest, MalformedFrame
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.base import Received, TransferFailed, Wanted
from perigee.kvstore.transfer.connections import Connections
from perigee.kvstore.transfer.receiving import Corrupt, Deliver, Outcome, receive_payloads, wait_in_kernel
from perigee.kvstore.transfer.settle import settle, shut_down

_log = logging.getLogger(__name__)

_SILENCE_S = 30.0  # beyond the wait that was asked for, after which a link counts as broken

_Outcomes = asyncio.Queue[Sequence[Outcome] | None]  # None is the end


class Exchange(Protocol):
    """Asks a peer for blocks and delivers them, blocking. Raises OSError, EOFError, or a StoreError of ours."""

    def __call__(self, link: socket.socket, wanted: Sequence[Wanted], wait_s: float, deliver: Deliver) -> None: ...


class TcpTransfer:
    """A `Transfer`. Each pull under way has a connection and a thread; at most `max_pulls` are, and others wait."""

    def __init__(self, secret: bytes = b"", *, max_pulls: int = 128, exchange: Exchange = receive_payloads) -> None:
        self.received_blocks_total = 0
        self.corrupt_received_total = 0
        self._exchange = exchange
        self._connections = Connections(secret)
        self._room = asyncio.Semaphore(max_pulls)
        self._threads = ThreadPoolExecutor(max_pulls, "perigee-receive")
        self._links: set[socket.socket] = set()  # that threads use now

    async def pull(self, peer: str, wanted: Sequence[Wanted], wait_s: float) -> AsyncGenerator[Received, None]:
        """See `Transfer`. A peer that cannot be reached is tried again, with backoff, until `wait_s` is over."""
        _check(wanted)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        async with self._room:
            link = await self._connections.take(peer, wait_s)
            outcomes: _Outcomes = asyncio.Queue()
            receiving = self._start(link, wanted, max(0.0, deadline - loop.time()), outcomes)
            try:
                while (delivered := await outcomes.get()) is not None:
                    for outcome in delivered:
                        if isinstance(outcome, Received):
                            self.received_blocks_total += 1
                            yield outcome
                        else:
                            self._count_corrupt(peer, outcome)
                _check_end(peer, receiving)
            finally:
                await self._finish(peer, link, receiving)

    async def close(self) -> None:
        """Ends all links; who still pulls gets TransferFailed."""
        for link in self._links:
            shut_down(link)
        await asyncio.to_thread(self._threads.shutdown)
        self._connections.close()

    def _start(
        self, link: socket.socket, wanted: Sequence[Wanted], wait_s: float, outcomes: _Outcomes
    ) -> "asyncio.Future[None]":
        """Lets a thread receive. What it delivers goes into `outcomes`, and None once it has ended."""
        loop = asyncio.get_running_loop()
        wait_in_kernel(link, wait_s + _SILENCE_S)

        def deliver(delivered: Sequence[Outcome]) -> None:
            loop.call_soon_threadsafe(outcomes.put_nowait, delivered)

        self._links.add(link)
        receiving = loop.run_in_executor(self._threads, self._exchange, link, tuple(wanted), wait_s, deliver)
        receiving.add_done_callback(lambda _: outcomes.put_nowait(None))
        return receiving

    async def _finish(self, peer: str, link: socket.socket, receiving: "asyncio.Future[None]") -> None:
        """Does not return, or raise, before the thread has stopped writing into slots."""
        if not receiving.done():
            shut_down(link)
        try:
            await settle(receiving)
        finally:
            self._links.remove(link)
            if receiving.exception():
                link.close()
            else:
                self._connections.give_back(peer, link)

    def _count_corrupt(self, peer: str, outcome: Corrupt) -> None:
        self.corrupt_received_total += 1
        _log.warning("corrupt block received peer=%s index=%d", peer, outcome.index)


def _check(wanted: Sequence[Wanted]) -> None:
    if not 0 < len(wanted) <= frames.MAX_KEYS:
        raise InvalidRequest(f"wanted: {len(wanted)} blocks; allowed are 1 to {frames.MAX_KEYS}")
    if len({block.key for block in wanted}) != len(wanted):
        raise InvalidRequest("wanted: a key is there twice")


def _check_end(peer: str, receiving: "asyncio.Future[None]") -> None:
    """Raises TransferFailed if the exchange did not come to its end."""
    try:
        receiving.result()
    except (OSError, EOFError, MalformedFrame) as error:
        raise TransferFailed(f"the pull from {peer!r} broke: {error}") from error
