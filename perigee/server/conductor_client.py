"""The server's conversation with the Conductor: events up, commands down, and the cluster's state."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType

import grpc

from perigee.kvstore.access import OPEN, Access
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler.scheduler_pb2_grpc import ConductorStub
from perigee.workers.client import CHANNEL_OPTIONS
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import ModelCard
from perigee.workers.wire import card_from_pb, ref_from_pb, ref_to_pb

logger = logging.getLogger(__name__)

# gRPC by itself waits up to two minutes before it tries a lost target again.
_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_RETRY_S = 0.2
_STATE_TIMEOUT_S = 2.0


class ConductorLost(Exception):
    """The stream to the Conductor broke: it has forgotten what this server told it."""


class Rejected(Exception):
    """The Conductor does not take an attempt now; `command` says why and when to ask again."""

    def __init__(self, command: pb.Reject) -> None:
        super().__init__(command.message)
        self.command = command


class Talk:
    """What one attempt says to the Conductor and hears from it. Leaving the context stops listening.

    Only the answers to `arrive` and `prefill_done` are waited for. All else is told if there is anybody to hear it: a
    new Conductor learns what runs from the workers.
    """

    def __init__(self, client: "ConductorClient", ref: Ref) -> None:
        self._client = client
        self._ref = ref
        self._inbox: asyncio.Queue[pb.Command | None] = asyncio.Queue()

    def __enter__(self) -> "Talk":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._client.forget(self._ref)

    async def arrive(self, event: pb.RequestArrived) -> pb.Dispatch:
        """Asks where to run. Raises Rejected, or ConductorLost if the stream broke before the answer came."""
        while not self._inbox.empty():  # what an earlier, broken stream left behind
            self._inbox.get_nowait()
        command = await self._ask(pb.ServerEvent(ref=ref_to_pb(self._ref), arrived=event))
        return command.dispatch

    async def prefill_done(self, event: pb.PrefillDone) -> None:
        """Waits for Proceed; raises Rejected. If the Conductor went away this counts as Proceed: what runs goes on."""
        if self._inbox.empty():  # else the stream broke since `arrive`, and whoever is there now knows nothing of us
            with suppress(ConductorLost):
                await self._ask(pb.ServerEvent(ref=ref_to_pb(self._ref), prefill_done=event))

    def joined(self) -> None:
        self._tell(pb.ServerEvent(ref=ref_to_pb(self._ref), joined=pb.Joined()))

    def finished(self, output_tokens: int, mean_tbt_s: float, max_tbt_s: float) -> None:
        event = pb.Finished(output_tokens=output_tokens, mean_tbt_s=mean_tbt_s, max_tbt_s=max_tbt_s)
        self._tell(pb.ServerEvent(ref=ref_to_pb(self._ref), finished=event))

    def failed(self, worker_id: str, code: str) -> None:
        self._tell(pb.ServerEvent(ref=ref_to_pb(self._ref), failed=pb.Failed(worker_id=worker_id, code=code)))

    def cancelled(self) -> None:
        self._tell(pb.ServerEvent(ref=ref_to_pb(self._ref), cancelled=pb.Cancelled()))

    def deliver(self, command: pb.Command | None) -> None:
        """Called by the client: a command for this attempt, or None when the stream broke."""
        self._inbox.put_nowait(command)

    async def _ask(self, event: pb.ServerEvent) -> pb.Command:
        self._client.send(event)
        command = await self._inbox.get()
        if command is None:
            raise ConductorLost
        if command.HasField("reject"):
            raise Rejected(command.reject)
        return command

    def _tell(self, event: pb.ServerEvent) -> None:
        with suppress(ConductorLost):
            self._client.send(event)


class ConductorClient:
    """Stays attached to the Conductor, through its restarts, and knows the cluster's last state."""

    def __init__(self, target: str, poll_s: float, access: Access) -> None:
        self._target = target
        self._poll_s = poll_s
        self._channel = access.channel(target, _OPTIONS)
        self._stub = ConductorStub(self._channel)
        self._talks: dict[Ref, Talk] = {}
        self._outbox: asyncio.Queue[pb.ServerEvent] | None = None  # None: not attached
        self._attached = asyncio.Event()
        self._epoch = 0
        self._state: pb.ClusterState | None = None
        self._reachable = False
        self._is_open = True  # a call that fails as it is cancelled hides that from who waits for it

    @classmethod
    @asynccontextmanager
    async def connected(cls, target: str, poll_s: float, access: Access = OPEN) -> AsyncIterator["ConductorClient"]:
        """A client that looks after its stream until the context is left. The Conductor need not be there yet."""
        client = cls(target, poll_s, access)
        tasks = [asyncio.create_task(client._stay_attached()), asyncio.create_task(client._stay_informed())]
        try:
            yield client
        finally:
            client._is_open = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client._channel.close()

    @property
    def state(self) -> pb.ClusterState | None:
        """The cluster as last heard of, None before that."""
        return self._state

    @property
    def reachable(self) -> bool:
        """Whether the Conductor answered when it was last asked for the state."""
        return self._reachable

    @property
    def card(self) -> ModelCard | None:
        """What the cluster serves, None until a worker has said so."""
        if self._state is None or not self._state.HasField("card"):
            return None
        return card_from_pb(self._state.card)

    def open(self, ref: Ref) -> Talk:
        talk = self._talks[ref] = Talk(self, ref)
        return talk

    def forget(self, ref: Ref) -> None:
        self._talks.pop(ref, None)

    def send(self, event: pb.ServerEvent) -> None:
        """Raises ConductorLost if no stream is open."""
        if self._outbox is None:
            raise ConductorLost
        self._outbox.put_nowait(event)

    async def attached(self) -> None:
        """Returns when a stream is open, at least as far as this side knows."""
        await self._attached.wait()

    async def refresh(self) -> pb.ClusterState | None:
        """Asks for the cluster's state now. The last known one if the Conductor does not answer."""
        try:
            self._state = await self._stub.Cluster(pb.ClusterRequest(), timeout=_STATE_TIMEOUT_S)
            self._reachable = True
        except grpc.aio.AioRpcError as error:
            if self._reachable:
                logger.warning("conductor unreachable target=%s code=%s", self._target, error.code().name)
            self._reachable = False
        return self._state

    async def receipts(self, request_id: str, tenant: str) -> pb.ReceiptsReply:
        """What the Conductor has written down about a request of this tenant. Raises ConductorLost."""
        request = pb.ReceiptsRequest(request_id=request_id, tenant=tenant)
        try:
            return await self._stub.Receipts(request, timeout=_STATE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise ConductorLost from error

    async def _stay_informed(self) -> None:
        while self._is_open:
            await self.refresh()
            await asyncio.sleep(self._poll_s)

    async def _stay_attached(self) -> None:
        while self._is_open:
            outbox: asyncio.Queue[pb.ServerEvent] = asyncio.Queue()
            try:
                await self._converse(outbox)
            except grpc.aio.AioRpcError as error:
                logger.info("conductor stream broke target=%s code=%s", self._target, error.code().name)
            finally:
                self._detach()
            await asyncio.sleep(_RETRY_S)

    async def _converse(self, outbox: asyncio.Queue[pb.ServerEvent]) -> None:
        self._outbox = outbox
        self._attached.set()
        async for command in self._stub.Attach(_each(outbox)):
            if command.epoch < self._epoch:
                logger.warning("command of a deposed conductor dropped epoch=%d ours=%d", command.epoch, self._epoch)
                continue
            self._epoch = command.epoch
            if talk := self._talks.get(ref_from_pb(command.ref)):
                talk.deliver(command)

    def _detach(self) -> None:
        self._outbox = None
        self._attached.clear()
        for talk in self._talks.values():
            talk.deliver(None)


async def _each(outbox: asyncio.Queue[pb.ServerEvent]) -> AsyncIterator[pb.ServerEvent]:
    while True:
        yield await outbox.get()
