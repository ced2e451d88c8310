"""One attempt's dealings with one worker."""

from types import TracebackType
from typing import NoReturn, TypeVar

from perigee.workers.client import AttemptChannel
from perigee.workers.engine.sequence import Sequence
from perigee.workers.messages import Failed, FromWorker, WorkerLost

T = TypeVar("T", bound=FromWorker)


class AttemptFailed(Exception):
    """A worker failed this attempt. `code` is one of the workers' failure codes, or "lost" if its stream broke."""

    def __init__(self, worker_id: str, code: str, message: str) -> None:
        super().__init__(f"worker {worker_id}: {code}: {message}")
        self.worker_id = worker_id
        self.code = code
        self.message = message


class Leg:
    """A context in which a worker deals with an attempt. Leaving it before `settle` cancels the attempt there."""

    def __init__(self, worker_id: str, channel: AttemptChannel) -> None:
        self.worker_id = worker_id
        self._channel = channel
        self._settled = False
        self._failure: AttemptFailed | None = None

    def __enter__(self) -> "Leg":
        self._channel.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self._settled:
            self._channel.cancel()
        self._channel.__exit__(exc_type, exc, tb)

    def start(self, sequence: Sequence, source: str, rank: float, role: str) -> None:
        """A worker that has another role by now fails the attempt."""
        self._channel.start(sequence, source, rank=rank, role=role)

    def prepare(self, sequence: Sequence, source: str, rank: float) -> None:
        self._channel.prepare(sequence, source, rank=rank)

    def joined(self) -> None:
        """To a prefill worker: its part is over."""
        self._channel.joined()
        self._settled = True

    def settle(self) -> None:
        """The worker itself ended the attempt, so there is nothing to cancel."""
        self._settled = True

    async def expect(self, kind: type[T]) -> T:
        """The worker's next message, which must be of this kind. Raises AttemptFailed, also again if it did once."""
        message = await self._receive()
        if isinstance(message, kind):
            return message
        self._failure = self._failure_of(message, kind.__name__)
        raise self._failure

    async def fails(self) -> NoReturn:
        """Listens while the worker has nothing to say. Raises AttemptFailed as soon as there is something."""
        self._failure = self._failure_of(await self._receive(), "nothing")
        raise self._failure

    async def _receive(self) -> FromWorker:
        if self._failure is None:
            try:
                return await self._channel.receive()
            except WorkerLost as lost:
                self._failure = AttemptFailed(self.worker_id, "lost", str(lost))
        raise self._failure

    def _failure_of(self, message: FromWorker, expected: str) -> AttemptFailed:
        if isinstance(message, Failed):
            self._settled = True
            return AttemptFailed(self.worker_id, message.code, message.message)
        text = f"sent {type(message).__name__} where {expected} was due"
        return AttemptFailed(self.worker_id, "internal", text)
