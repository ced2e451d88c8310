"""The front end's side of `Attach`: one stream to one worker, many attempts multiplexed on it."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType

import grpc

from perigee.kvstore.access import OPEN, Access
from perigee.workers import worker_pb2 as pb
from perigee.workers.engine.sequence import Ref, Sequence
from perigee.workers.messages import FromWorker, WorkerLost
from perigee.workers.wire import from_worker, ref_to_pb, sequence_to_pb
from perigee.workers.worker_pb2_grpc import WorkerStub

# A prompt's tokens and block keys travel in one message: 5 bytes a token and 34 a block, so a million tokens fit.
MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)


class AttemptChannel:
    """What one attempt says to a worker and hears from it. Leaving the context stops listening."""

    def __init__(self, client: "WorkerClient", ref: Ref) -> None:
        self._client = client
        self._ref = ref
        self._inbox: asyncio.Queue[FromWorker | None] = asyncio.Queue()

    def __enter__(self) -> "AttemptChannel":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._client.forget(self._ref)

    def start(self, sequence: Sequence, source: str = "", *, rank: float = 0.0, role: str = "") -> None:
        """`role` is what the worker is taken for, if that matters: it fails the attempt if it has another by now."""
        wire = sequence_to_pb(sequence)
        self._client.send(pb.ToWorker(start=pb.Start(sequence=wire, source=source, rank=rank, role=role)))

    def prepare(self, sequence: Sequence, source: str = "", *, rank: float = 0.0) -> None:
        wire = sequence_to_pb(sequence)
        self._client.send(pb.ToWorker(prepare=pb.Prepare(sequence=wire, source=source, rank=rank)))

    def joined(self) -> None:
        self._client.send(pb.ToWorker(joined=pb.Joined(ref=ref_to_pb(self._ref))))

    def cancel(self) -> None:
        self._client.send(pb.ToWorker(cancel=pb.Cancel(ref=ref_to_pb(self._ref))))

    def deliver(self, message: FromWorker | None) -> None:
        """Called by the client: a message for this attempt, or None when the stream broke."""
        self._inbox.put_nowait(message)

    async def receive(self) -> FromWorker:
        """The next message about this attempt. Raises WorkerLost once the stream is broken."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)  # for whoever asks again
            raise WorkerLost(f"worker {self._client.worker_id}: its stream broke")
        return message


class WorkerClient:
    """One `Attach` stream to one incarnation of a worker. It never reconnects: a new stream is a new client."""

    def __init__(self, worker_id: str, channel: grpc.aio.Channel) -> None:
        self.worker_id = worker_id
        self._channel = channel
        self._outbox: asyncio.Queue[pb.ToWorker | None] = asyncio.Queue()
        self._attempts: dict[Ref, AttemptChannel] = {}
        self._closed = False
        self._pump = asyncio.create_task(self._receive(), name=f"attach-{worker_id}")

    @classmethod
    async def connect(cls, worker_id: str, address: str, access: Access = OPEN) -> "WorkerClient":
        """Opens the stream. A worker that is not there shows itself as a broken stream, at once."""
        return cls(worker_id, access.channel(address, CHANNEL_OPTIONS))

    @property
    def closed(self) -> bool:
        """Whether the stream is broken or was closed."""
        return self._closed

    def open(self, ref: Ref) -> AttemptChannel:
        """Starts listening to what the worker says about `ref`."""
        attempt = AttemptChannel(self, ref)
        self._attempts[ref] = attempt
        if self._closed:
            attempt.deliver(None)
        return attempt

    def forget(self, ref: Ref) -> None:
        self._attempts.pop(ref, None)

    def send(self, message: pb.ToWorker) -> None:
        if not self._closed:
            self._outbox.put_nowait(message)

    async def close(self) -> None:
        """Ends the stream; the worker forgets all sequences that came over it."""
        self._outbox.put_nowait(None)
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        await self._channel.close()

    async def _receive(self) -> None:
        try:
            async for message in WorkerStub(self._channel).Attach(self._requests()):
                for said in from_worker(message):
                    if attempt := self._attempts.get(said.ref):
                        attempt.deliver(said)
        except grpc.aio.AioRpcError:
            pass  # the attempts hear of it below
        finally:
            self._closed = True
            for attempt in self._attempts.values():
                attempt.deliver(None)

    async def _requests(self) -> AsyncIterator[pb.ToWorker]:
        while (message := await self._outbox.get()) is not None:
            yield message
