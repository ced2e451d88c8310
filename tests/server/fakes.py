"""A scripted cluster: a Conductor and workers that speak the real protocol over real sockets, and compute nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from perigee.kvstore.directory_pb2 import Member
from perigee.kvstore.store_pb2 import StoreStatus
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler import scheduler_pb2_grpc
from perigee.workers import wire, worker_pb2, worker_pb2_grpc
from perigee.workers.engine.sequence import FinishReason, Ref, Token
from perigee.workers.engine.sequence import Sequence as Work
from perigee.workers.messages import DecodeJoined, Failed, ModelCard, PrefillDone, StepOutput

Outbox = asyncio.Queue[Any]


class Heard:
    """A list that can be waited for."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._changed = asyncio.Condition()

    async def add(self, item: Any) -> None:
        async with self._changed:
            self.items.append(item)
            self._changed.notify_all()

    async def until(self, wanted: Callable[[Any], bool], count: int = 1) -> list[Any]:
        async with self._changed:
            await self._changed.wait_for(lambda: sum(map(wanted, self.items)) >= count)
        return [item for item in self.items if wanted(item)]


async def converse(requests: AsyncIterator[Any], outbox: Outbox, heard: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """One side of a bidirectional stream: hands on what comes, sends what is put in `outbox` until None."""

    async def read() -> None:
        async for message in requests:
            await heard(message)
        outbox.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (message := await outbox.get()) is not None:
            yield message
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


class FakeServer:
    """A gRPC server on a Unix socket that can go away and come back."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self._server: grpc.aio.Server | None = None

    def register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def up(self) -> None:
        self._server = grpc.aio.server()
        self.register(self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def down(self) -> None:
        """Breaks all streams, as the death of a process does."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace=None)


class FakeConductor(FakeServer, scheduler_pb2_grpc.ConductorServicer):
    """Sends every request to `prefill` and `decode`, unless `answers` holds something else to say next."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.heard = Heard()
        self.state = pb.ClusterState(ready=True)
        self.prefill: FakeWorker | None = None
        self.decode: FakeWorker | None = None
        self.answers: list[pb.Command] = []  # used up first, in order; a command without content: no answer at all
        self.answers_prefill_done: list[pb.Command] = []
        self.predicts = (0.0, 0.0)  # TTFT and TBT
        self.receipts: dict[tuple[str, str], list[str]] = {}  # of a tenant's request

    def register(self, server: grpc.aio.Server) -> None:
        scheduler_pb2_grpc.add_ConductorServicer_to_server(self, server)

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[pb.Command]:
        outbox: Outbox = asyncio.Queue()

        async def hear(event: pb.ServerEvent) -> None:
            await self.heard.add(event)
            for command in self._react(event):
                command.ref.CopyFrom(event.ref)
                outbox.put_nowait(command)

        async for command in converse(requests, outbox, hear):
            yield command

    async def Cluster(self, request: Any, context: Any) -> pb.ClusterState:
        return self.state

    async def Receipts(self, request: Any, context: Any) -> pb.ReceiptsReply:
        return pb.ReceiptsReply(documents=self.receipts.get((request.tenant, request.request_id), ()), limit=77)

    def events(self, kind: str) -> list[pb.ServerEvent]:
        return [event for event in self.heard.items if event.WhichOneof("event") == kind]

    async def hears(self, kind: str, count: int = 1) -> list[pb.ServerEvent]:
        return await self.heard.until(lambda event: event.WhichOneof("event") == kind, count)

    def _react(self, event: pb.ServerEvent) -> list[pb.Command]:
        match event.WhichOneof("event"):
            case "arrived":
                return _next(self.answers, pb.Command(dispatch=self.dispatch()))
            case "prefill_done":
                return _next(self.answers_prefill_done, pb.Command(proceed=pb.Proceed()))
        return []

    def dispatch(self) -> pb.Dispatch:
        assert self.prefill and self.decode
        ttft_s, tbt_s = self.predicts
        return pb.Dispatch(
            prefill=self.prefill.where(),
            decode=self.decode.where(),
            predicted_ttft_s=ttft_s,
            predicted_tbt_s=tbt_s,
        )


def _next(scripted: list[pb.Command], default: pb.Command) -> list[pb.Command]:
    command = scripted.pop(0) if scripted else default
    return [command] if command.WhichOneof("command") else []


def reject(reason: "pb.Reject.Reason.ValueType" = pb.Reject.OVERLOAD, retry_after_s: float = 3.2) -> pb.Command:
    return pb.Command(
        reject=pb.Reject(
            reason=reason, message="no room", retry_after_s=retry_after_s, predicted_ttft_s=9.0, predicted_tbt_s=0.5
        )
    )


class FakeWorker(FakeServer, worker_pb2_grpc.WorkerServicer):
    """Answers each sequence with the tokens that `answer` gives for it, as a worker of its role does."""

    def __init__(self, path: Path, worker_id: str, role: str, card: ModelCard) -> None:
        super().__init__(path)
        self.id = worker_id
        self.role = role
        self.incarnation = "1"
        self.card = card
        self.heard = Heard()
        self.answer: Callable[[Work], Sequence[Token]] = lambda work: []
        self.eos: int | None = None
        self.cached = (0, 0, 0)
        self.die_at: int | None = None  # breaks its streams instead of sending the token of this index
        self.fail_at: tuple[int, str] | None = None  # the same with Failed of this code
        self.wait_at: int | None = None  # waits for `go_on` before it sends the token of this index
        self.go_on = asyncio.Event()
        self.may_join = asyncio.Event()
        self.may_join.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServicer_to_server(self, server)

    def where(self) -> pb.WorkerAddress:
        return pb.WorkerAddress(id=self.id, address=self.address, incarnation=self.incarnation)

    def state(self) -> pb.WorkerState:
        report = worker_pb2.WorkerReport(
            worker_id=self.id,
            role=self.role,
            total_pages=100,
            computed_prompt_tokens_total=7,
            card=wire.card_to_pb(self.card),
        )
        return pb.WorkerState(
            member=Member(id=self.id, kind=Member.WORKER, pid=42, address=self.address, store="store-0"), report=report
        )

    async def hears(self, kind: str, count: int = 1) -> list[Any]:
        messages = await self.heard.until(lambda message: message.WhichOneof("message") == kind, count)
        return [getattr(message, kind) for message in messages]

    def said(self, kind: str) -> list[Any]:
        return [getattr(m, kind) for m in self.heard.items if m.WhichOneof("message") == kind]

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[worker_pb2.FromWorker]:
        outbox: Outbox = asyncio.Queue()
        running: dict[Ref, asyncio.Task[None]] = {}

        async def hear(message: worker_pb2.ToWorker) -> None:
            await self.heard.add(message)
            if message.HasField("start"):
                work = wire.sequence_from_pb(message.start.sequence)
                running[work.ref] = asyncio.create_task(self._work(work, outbox))
            elif message.HasField("cancel") and (task := running.get(wire.ref_from_pb(message.cancel.ref))):
                task.cancel()

        try:
            async for message in converse(requests, outbox, hear):
                yield message
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _work(self, work: Work, outbox: Outbox) -> None:
        tokens = list(self.answer(work))[: work.sampling.max_tokens]
        begin = work.num_outputs
        end = begin + 1 if self.role == "prefill" else len(tokens)
        if self.role == "decode":
            await self.may_join.wait()
            outbox.put_nowait(wire.joined_to_pb(DecodeJoined(work.ref)))
        for index in range(begin, end):
            if index == self.wait_at:
                await self.go_on.wait()
            if index == self.die_at:
                return outbox.put_nowait(None)
            if self.fail_at and index == self.fail_at[0]:
                return outbox.put_nowait(wire.failed_to_pb(Failed(work.ref, self.fail_at[1], "as scripted")))
            outbox.put_nowait(self._says(work, index, tokens[index], begin))
        return None

    def _says(self, work: Work, index: int, token: Token, begin: int) -> worker_pb2.FromWorker:
        reason = FinishReason.STOP if token.token == self.eos else FinishReason.NOT_FINISHED
        if reason is FinishReason.NOT_FINISHED and index + 1 == work.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if index == begin and self.role != "decode":
            return wire.prefill_done_to_pb(PrefillDone(work.ref, token, reason, *self.cached))
        return wire.outputs_to_pb([StepOutput(work.ref, index, token, reason)])


def store_state() -> pb.StoreState:
    return pb.StoreState(
        member=Member(id="store-0", kind=Member.STORE, pid=43, address="unix:/store"),
        status=StoreStatus(node_id="store-0", num_slots=10, free_slots=4, stored_total=6),
    )
