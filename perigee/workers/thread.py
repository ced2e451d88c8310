"""Gives an engine its thread, and lets asyncio talk to it.

Everything that touches the engine runs in this thread: steps, and between them whatever `call` brings, in the order in
which it was called. So what was called before `remove` has ended when the pages are freed.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from perigee.workers.engine.batcher import Active
from perigee.workers.engine.engine import Engine, StepResult
from perigee.workers.engine.sequence import Ref, Sequence

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineStopped(Exception):
    """The engine's thread has ended; nothing runs there any more."""


class EngineThread:
    """Owns the engine. `on_step` runs in the thread right after each step, while the pages are as it left them."""

    def __init__(self, engine: Engine, on_step: Callable[[StepResult], None]) -> None:
        self.engine = engine
        self._on_step = on_step
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._admissions: dict[Ref, asyncio.Future[Active]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._calls: set[asyncio.Future[Any]] = set()
        self._is_stopped = False
        self.load = engine.load()  # as of the last step; the thread replaces it whole
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step at hand and what was called before, and waits for that."""
        self._inbox.put(None)
        await asyncio.wait([self.ended])

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Runs `function` between two steps; returns what it returns, raises its ValueError.

        Once called it runs, even if the caller is cancelled. Raises EngineStopped if the thread ends before.
        """
        if self._is_stopped:
            raise EngineStopped
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                result = function(*args)
            except ValueError as error:  # what was asked is wrong: the caller's matter. All else ends the engine.
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_resolve, future, result)

        self._inbox.put(run)
        return await future

    async def admit(self, sequence: Sequence, *, one_token: bool, rank: float = 0.0) -> Active:
        """Waits until the sequence holds pages. `remove` ends the waiting, too."""
        admitted: asyncio.Future[Active] = self._loop.create_future()
        self._admissions[sequence.ref] = admitted
        try:
            await self.call(lambda: self.engine.batcher.add(sequence, one_token=one_token, rank=rank))
            return await admitted
        finally:
            self._admissions.pop(sequence.ref, None)

    async def remove(self, ref: Ref) -> None:
        """Frees what the sequence holds, or takes it out of the queue."""
        await self.call(self.engine.batcher.remove, ref)

    def _run(self) -> None:
        # OpenMP counts threads for each thread that has some: here it would give all cores to what is not torch's.
        torch.set_num_threads(torch.get_num_threads())
        try:
            while self._drain():
                self._admit()
                if result := self.engine.step():
                    self._on_step(result)
                    self._admit()  # the step may have made room for the next prompt
                self.load = self.engine.load()
            self._loop.call_soon_threadsafe(self._end, None)
        except Exception as error:
            logger.exception("engine stopped")
            self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: Exception | None) -> None:
        self._is_stopped = True
        for future in tuple(self._calls) + tuple(self._admissions.values()):
            _fail(future, EngineStopped())
        if error:
            _fail(self.ended, error)
        else:
            _resolve(self.ended, None)

    def _drain(self) -> bool:
        """Runs what was called, waiting for it when there is nothing to compute. False when it is time to stop."""
        idle = not self.engine.batcher.has_work
        while idle or not self._inbox.empty():
            function = self._inbox.get()
            if function is None:
                return False
            function()
            idle = False
        return True

    def _admit(self) -> None:
        for active in self.engine.batcher.admit():
            self._loop.call_soon_threadsafe(self._admitted, active)

    def _admitted(self, active: Active) -> None:
        if waiting := self._admissions.get(active.ref):
            _resolve(waiting, active)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
