"""Workers and store nodes that say what a script has them say, over real gRPC; and a front end to talk with."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import grpc

from perigee.kvstore import store_pb2
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.directory import Member, stay_joined
from perigee.kvstore.messages import BlockEvent
from perigee.kvstore.store_pb2_grpc import StoreNodeServicer, add_StoreNodeServicer_to_server
from perigee.kvstore.wire import event_to_pb
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler import scheduler_pb2_grpc as rpc
from perigee.workers import worker_pb2
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import WorkerReport
from perigee.workers.wire import ref_to_pb, report_to_pb
from perigee.workers.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tests.scheduler.cluster import CARD, keys

WAIT_S = 60.0  # for what must come; nothing here waits that long
REPORT_S = 0.25  # as often as a worker reports; one that falls silent is taken to be gone

_Value = TypeVar("_Value")


async def until(probe: Callable[[], Awaitable[_Value | None]]) -> _Value:
    """Asks again until there is an answer."""
    async with asyncio.timeout(WAIT_S):
        while True:
            if (value := await probe()) is not None:
                return value
            await asyncio.sleep(0.01)


class FakeWorker(WorkerServicer):
    """Reports what it was last told to report, to whoever watches, at once and every now and then."""

    def __init__(self, worker_id: str, role: str, incarnation: str = "1", **report: object) -> None:
        idle = WorkerReport(worker_id, incarnation, role, CARD, free_pages=100, total_pages=100, max_sequences=8)
        self.report = replace(idle, **report)  # type: ignore[arg-type]
        self.num_watches = 0
        self._changed = asyncio.Event()

    def say(self, **report: object) -> None:
        self.report = replace(self.report, **report)  # type: ignore[arg-type]
        self._changed.set()
        self._changed = asyncio.Event()

    def register(self, server: grpc.aio.Server) -> None:
        add_WorkerServicer_to_server(self, server)

    def member(self, address: str) -> Member:
        report = self.report
        return Member(report.worker_id, report.incarnation, "worker", address, 4321, "here", "store-0")

    async def Watch(self, request: worker_pb2.WatchRequest, context: object) -> AsyncIterator[worker_pb2.WorkerReport]:
        self.num_watches += 1
        while True:
            changed = self._changed
            yield report_to_pb(self.report)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), REPORT_S)

    async def Attach(
        self, request_iterator: object, context: "grpc.aio.ServicerContext[worker_pb2.ToWorker, worker_pb2.FromWorker]"
    ) -> AsyncIterator[worker_pb2.FromWorker]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)
        yield worker_pb2.FromWorker()


class FakeStore(StoreNodeServicer):
    """Sends a snapshot to each watcher and then what it is told, right or wrong."""

    def __init__(self, node_id: str = "store-0", incarnation: str = "1", held: Sequence[BlockKey] = ()) -> None:
        self.node_id = node_id
        self.incarnation = incarnation
        self.held = tuple(held)
        self.num_watches = 0
        self.answers_status = True
        self._messages: asyncio.Queue[store_pb2.BlockEvents] = asyncio.Queue()

    def say(self, first_seq: int, *stored: BlockKey) -> None:
        self._messages.put_nowait(self._events(first_seq, stored))

    def register(self, server: grpc.aio.Server) -> None:
        add_StoreNodeServicer_to_server(self, server)

    def member(self, address: str) -> Member:
        return Member(self.node_id, self.incarnation, "store", address, 1234, "here")

    async def Watch(self, request: store_pb2.WatchRequest, context: object) -> AsyncIterator[store_pb2.BlockEvents]:
        self.num_watches += 1
        yield self._events(0, self.held, snapshot=True)
        while True:
            yield await self._messages.get()

    async def Status(self, request: store_pb2.StatusRequest, context: object) -> store_pb2.StoreStatus:
        if not self.answers_status:
            await asyncio.Event().wait()
        return store_pb2.StoreStatus(node_id=self.node_id, incarnation=self.incarnation, num_slots=77)

    def _events(self, first_seq: int, stored: Sequence[BlockKey], snapshot: bool = False) -> store_pb2.BlockEvents:
        return store_pb2.BlockEvents(
            node_id=self.node_id,
            incarnation=self.incarnation,
            first_seq=first_seq,
            snapshot=snapshot,
            events=[event_to_pb(BlockEvent(True, key)) for key in stored],
        )


@asynccontextmanager
async def serving(fake: FakeWorker | FakeStore, address: str) -> AsyncIterator[None]:
    """Its gRPC server, until the context is left. That breaks every stream at once, as a death does."""
    server = grpc.aio.server()
    fake.register(server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def living(fake: FakeWorker | FakeStore, address: str, directory: str) -> AsyncIterator[None]:
    """It serves and is a member, until the context is left."""
    async with serving(fake, address), joined(fake, address, directory):
        yield


@asynccontextmanager
async def joined(fake: FakeWorker | FakeStore, address: str, directory: str) -> AsyncIterator[None]:
    """It is a member, whether it serves or not, until the context is left."""
    membership = asyncio.create_task(stay_joined(directory, fake.member(address)))
    try:
        yield
    finally:
        membership.cancel()
        await asyncio.wait([membership])


class FrontEnd:
    """One Attach stream. Answers are read in order."""

    def __init__(self, stub: "rpc.ConductorAsyncStub") -> None:
        self._call = stub.Attach()

    async def say(self, event: pb.ServerEvent) -> None:
        await self._call.write(event)

    async def ask(self, event: pb.ServerEvent) -> pb.Command:
        await self.say(event)
        return await self.hear()

    async def hear(self) -> pb.Command:
        """The next command. Raises AioRpcError if the stream is broken."""
        async with asyncio.timeout(WAIT_S):
            command = await self._call.read()
        assert isinstance(command, pb.Command), "the stream has ended"
        return command

    async def end(self) -> None:
        """Says that nothing more will come, and waits for the other side to end too."""
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF

    def leave(self) -> None:
        """Breaks the stream."""
        self._call.cancel()


def arrived(
    request_id: str, num_tokens: int = 64, max_tokens: int = 32, attempt: int = 0, salt: int = 0
) -> pb.ServerEvent:
    event = pb.RequestArrived(block_keys=keys(num_tokens, salt), num_tokens=num_tokens, max_tokens=max_tokens)
    return pb.ServerEvent(ref=ref_to_pb(Ref(request_id, 0, attempt)), arrived=event)
