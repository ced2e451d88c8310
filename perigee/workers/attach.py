"""One server's `Attach` stream, seen from the worker: messages become running sessions, and their end a message."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial

from perigee.kvstore.errors import BlocksMissing, NoRoom, StoreError, TooLarge
from perigee.workers import worker_pb2 as pb
from perigee.workers.config import computes_prompts
from perigee.workers.decode import decode
from perigee.workers.engine.sequence import Ref, Sequence
from perigee.workers.host import Host
from perigee.workers.messages import Failed
from perigee.workers.prefill import prefill
from perigee.workers.session import Session
from perigee.workers.thread import EngineStopped
from perigee.workers.wire import failed_to_pb, ref_from_pb, sequence_from_pb

logger = logging.getLogger(__name__)

Role = Callable[[Session], Coroutine[None, None, None]]


class ServerStream:
    """The sessions of one server. They end with its stream."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._outbox: asyncio.Queue[pb.FromWorker | None] = asyncio.Queue()
        self._tasks: dict[Ref, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()  # cancelled, still cleaning up
        self.ended = asyncio.Event()

    async def converse(self, requests: AsyncIterator[pb.ToWorker]) -> AsyncIterator[pb.FromWorker]:
        """Answers until the server hangs up, or `end`."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            for ref in list(self._tasks):
                self._cancel(ref)
            self.ended.set()

    def end(self) -> None:
        """Hangs up, once all that was said until now is on its way."""
        self._send(None)

    async def _read(self, requests: AsyncIterator[pb.ToWorker]) -> None:
        try:
            async for message in requests:
                self._receive(message)
        finally:
            self._send(None)

    def _send(self, message: pb.FromWorker | None) -> None:
        self._outbox.put_nowait(message)

    def _receive(self, message: pb.ToWorker) -> None:
        match message.WhichOneof("message"):
            case "start":
                self._start(message.start)
            case "prepare":
                self._prepare(message.prepare)
            case "joined":
                if session := self._host.sessions.get(ref_from_pb(message.joined.ref)):
                    session.joined.set()
            case "cancel":
                self._cancel(ref_from_pb(message.cancel.ref))

    def _start(self, start: pb.Start) -> None:
        """To a decode worker: the sequence that it prepared, with its first token. To the others: a new one."""
        sequence, host = sequence_from_pb(start.sequence), self._host
        if start.role not in ("", host.role):
            self._fail(sequence.ref, "unknown", f"role: {start.role!r} was wanted, this worker is {host.role} by now")
        elif computes_prompts(host.role):
            self._open(sequence, start.rank, lambda session: prefill(host, session, start.source))
        elif session := host.sessions.get(sequence.ref):
            self._go_on(session, sequence)
        else:
            self._fail(sequence.ref, "unknown", "it was not prepared here, or has ended since")

    def _prepare(self, prepare: pb.Prepare) -> None:
        sequence, host = sequence_from_pb(prepare.sequence), self._host
        if host.role != "decode":
            self._fail(sequence.ref, "unknown", f"role: this worker is {host.role} by now, and prepares nothing")
        else:
            self._open(sequence, prepare.rank, lambda session: decode(host, session, prepare.source))

    def _go_on(self, session: Session, sequence: Sequence) -> None:
        try:
            session.start(sequence)
        except ValueError as error:
            self._cancel(session.ref)
            self._fail(session.ref, "invalid", str(error))

    def _open(self, sequence: Sequence, rank: float, role: Role) -> None:
        if problem := self._host.refusal(sequence):
            self._fail(sequence.ref, "invalid", problem)
        elif not math.isfinite(rank):
            self._fail(sequence.ref, "invalid", f"rank: is {rank}, allowed is any finite number")
        elif sequence.ref in self._host.sessions:
            self._fail(sequence.ref, "invalid", "ref: this attempt is running already")
        else:
            session = self._host.open(sequence, self._send, rank)
            task = asyncio.create_task(self._run(session, role), name=str(session.ref))
            self._tasks[session.ref] = task
            task.add_done_callback(partial(self._ended, session))

    def _cancel(self, ref: Ref) -> None:
        """Once: a second cancellation would hit the cleaning up after the first."""
        if task := self._tasks.pop(ref, None):
            self._ending.add(task)
            task.cancel()

    def _ended(self, session: Session, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        self._tasks.pop(session.ref, None)
        self._host.close(session)
        if not task.cancelled() and (error := task.exception()):
            logger.error("broken ref=%s", session.ref, exc_info=error)
            self._fail(session.ref, "internal", "the worker has a fault, its log says more")

    async def _run(self, session: Session, role: Role) -> None:
        ref = session.ref
        logger.info("begin role=%s ref=%s tokens=%d", self._host.role, ref, len(session.sequence.token_ids))
        try:
            await role(session)
            logger.info("end ref=%s", ref)
        except (StoreError, EngineStopped, ValueError) as error:
            self._fail(ref, _failure_code(error), str(error))
        except asyncio.CancelledError:
            logger.info("cancelled ref=%s", ref)
            raise

    def _fail(self, ref: Ref, code: str, message: str) -> None:
        logger.warning("failed ref=%s code=%s message=%s", ref, code, message)
        self._send(failed_to_pb(Failed(ref, code, message)))


def _failure_code(error: Exception) -> str:
    match error:
        case BlocksMissing():
            return "blocks_missing"
        case NoRoom():
            return "no_room"
        case TooLarge():
            return "invalid"
        case _:
            return "internal"
