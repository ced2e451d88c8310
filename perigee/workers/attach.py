"""One server's `Attach` stream, seen from the worker: messages become running sessions, and their end a message."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

from perigee.kvstore.errors import BlocksMissing, NoRoom, StoreError, TooLarge
from perigee.workers import worker_pb2 as pb
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

    async def converse(self, requests: AsyncIterator[pb.ToWorker]) -> AsyncIterator[pb.FromWorker]:
        """Answers until the server hangs up."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:
            for task in (reader, *self._tasks.values()):
                task.cancel()

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
                self._start(sequence_from_pb(message.start.sequence))
            case "prepare":
                source = message.prepare.source
                self._open(sequence_from_pb(message.prepare.sequence), lambda s: decode(self._host, s, source))
            case "joined":
                if session := self._host.sessions.get(ref_from_pb(message.joined.ref)):
                    session.joined.set()
            case "cancel":
                if task := self._tasks.get(ref_from_pb(message.cancel.ref)):
                    task.cancel()

    def _start(self, sequence: Sequence) -> None:
        """To a decode worker: the sequence that it prepared, with its first token. To the others: a new one."""
        if self._host.role != "decode":
            self._open(sequence, lambda session: prefill(self._host, session))
        elif session := self._host.sessions.get(sequence.ref):
            session.start(sequence)
        else:
            self._fail(sequence.ref, "unknown", "it was not prepared here, or has ended since")

    def _open(self, sequence: Sequence, role: Role) -> None:
        if problem := self._host.refusal(sequence):
            self._fail(sequence.ref, "invalid", problem)
        elif sequence.ref in self._host.sessions:
            self._fail(sequence.ref, "invalid", "ref: this attempt is running already")
        else:
            session = self._host.open(sequence, self._send)
            task = asyncio.create_task(self._run(session, role), name=str(session.ref))
            self._tasks[session.ref] = task

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
        finally:
            self._host.close(session)
            self._tasks.pop(ref, None)

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
