"""A worker as a process: its gRPC service, its place in the directory, and its end."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from perigee.kvstore.addresses import announced
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.client import StoreClient
from perigee.kvstore.directory import Member, stay_joined
from perigee.kvstore.errors import StoreClosed
from perigee.workers import worker_pb2 as pb
from perigee.workers.attach import ServerStream
from perigee.workers.client import CHANNEL_OPTIONS
from perigee.workers.config import ROLES, Role, WorkerConfig
from perigee.workers.engine.engine import EngineLoad
from perigee.workers.host import Host, WorkerBusy
from perigee.workers.loading import load_engine, model_card
from perigee.workers.messages import ModelCard, WorkerReport
from perigee.workers.model.checkpoint import resolve
from perigee.workers.model.config import ModelConfig, load_config
from perigee.workers.wire import report_to_pb
from perigee.workers.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

logger = logging.getLogger(__name__)

# A report follows a change at once, but not more often than this, and is repeated when nothing changes.
REPORT_MIN_S = 0.02
REPORT_MAX_S = 0.25

STORE_RETRY_S = 0.2

# For which a worker that is told to end waits for what was sent to it before anybody knew.
LINGER_S = 0.25


@dataclass(frozen=True, slots=True)
class _State:
    """What a report tells that changes, but for totals."""

    role: Role
    draining: bool
    load: EngineLoad


class WorkerService(WorkerServicer):
    """Answers for one host, and sees it out."""

    def __init__(self, host: Host, config: WorkerConfig, card: ModelCard, incarnation: str) -> None:
        self._host = host
        self._config = config
        self._card = card
        self._incarnation = incarnation
        self._streams: set[ServerStream] = set()
        self._draining = False

    async def Attach(
        self, request_iterator: AsyncIterator[pb.ToWorker], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.FromWorker]:
        """One server's stream. What it started ends with it."""
        stream = ServerStream(self._host)
        self._streams.add(stream)
        try:
            async for message in stream.converse(request_iterator):
                yield message
        finally:
            self._streams.discard(stream)

    async def Watch(
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WorkerReport]:
        """The state now, on change, and every 250 ms."""
        while True:
            state = self._state
            yield report_to_pb(self._report(state))
            await self._change(state)

    async def SetRole(
        self, request: pb.SetRoleRequest, context: "grpc.aio.ServicerContext[pb.SetRoleRequest, pb.RoleSet]"
    ) -> pb.RoleSet:
        if request.incarnation != self._incarnation:
            text = f"incarnation: is {self._incarnation}, {request.incarnation!r} was meant"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        role = next((role for role in ROLES if role == request.role), None)
        if role is None:
            text = f"role: is {request.role!r}, allowed are {', '.join(ROLES)}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        try:
            await self._set_role(role)
        except WorkerBusy as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.RoleSet()

    async def drain(self) -> None:
        """Goes on with the sequences that are here or on their way, and hangs up on the servers when none is left."""
        self._draining = True
        if self._streams:
            await asyncio.sleep(LINGER_S)
        await self._host.quiet()
        streams = list(self._streams)
        for stream in streams:
            stream.end()
        await asyncio.gather(*(stream.ended.wait() for stream in streams))

    async def _set_role(self, role: Role) -> None:
        before = self._host.role
        await self._host.set_role(role)
        logger.info("role set worker=%s role=%s before=%s", self._config.id, role, before)

    @property
    def _state(self) -> _State:
        return _State(self._host.role, self._draining, self._host.thread.load)

    def _report(self, state: _State) -> WorkerReport:
        totals = self._host.thread.engine.totals
        return WorkerReport(
            worker_id=self._config.id,
            incarnation=self._incarnation,
            role=state.role,
            card=self._card,
            draining=state.draining,
            last_step_s=totals.last_step_s,
            computed_prompt_tokens_total=totals.computed_prompt_tokens,
            cached_prompt_tokens_total=totals.cached_prompt_tokens,
            output_tokens_total=totals.output_tokens,
            steps_total=totals.steps,
            **asdict(state.load),
        )

    async def _change(self, state: _State) -> None:
        """Returns when the state is another, at the latest after REPORT_MAX_S."""
        for _ in range(round(REPORT_MAX_S / REPORT_MIN_S)):
            await asyncio.sleep(REPORT_MIN_S)
            if self._state != state:
                return


async def run(config: WorkerConfig) -> None:
    """Serves until cancelled, or until the engine or the store node is gone: then it raises.

    What is cancelled does first what it has, for `drain_s` at most; a second cancellation ends that.
    """
    directory = resolve(config.model, config.dtype)
    model = load_config(directory, config.moba)
    if model.moba:
        model.moba.check(config.block_tokens, model.num_layers)
    incarnation = secrets.token_hex(8)
    payload_bytes = model.payload_layout(config.dtype, config.block_tokens).payload_bytes
    store = await _connect(config, incarnation, payload_bytes)
    try:
        await _serve(config, directory, model, store, incarnation)
    finally:
        await store.close()


async def _connect(config: WorkerConfig, incarnation: str, payload_bytes: int) -> StoreClient:
    """Waits for the store node, which may start after the worker. Raises StoreError after `store_wait_s`."""
    give_up_at = time.monotonic() + config.store_wait_s
    while True:
        try:
            return await StoreClient.connect(
                config.store,
                worker_id=config.id,
                incarnation=incarnation,
                payload_bytes=payload_bytes,
                block_tokens=config.block_tokens,
            )
        except StoreClosed:
            if time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(STORE_RETRY_S)


async def _serve(
    config: WorkerConfig, directory: Path, model: ModelConfig, store: StoreClient, incarnation: str
) -> None:
    card, engine = await asyncio.gather(
        asyncio.to_thread(model_card, directory, model, config),
        asyncio.to_thread(load_engine, directory, model, config),
    )
    host = Host(config.role, engine, store, BlockKey(card.namespace), config.store_wait_s)
    server = config.access.server(CHANNEL_OPTIONS)
    service = WorkerService(host, config, card, incarnation)
    add_WorkerServicer_to_server(service, server)
    port = server.add_insecure_port(config.listen)
    await server.start()
    host.thread.start()
    member = Member(
        id=config.id,
        incarnation=incarnation,
        kind="worker",
        address=announced(config.listen, port, config.advertise),
        pid=os.getpid(),
        host=socket.gethostname(),
        store=config.store_id,
    )
    logger.info("serving worker=%s role=%s address=%s model=%s", config.id, config.role, member.address, card.name)
    joined = asyncio.create_task(stay_joined(config.directory, member, config.access))
    try:
        await _until_lost(host, store)
    except asyncio.CancelledError:
        await _drain(service, host, store, config)
        raise
    finally:
        joined.cancel()
        await asyncio.gather(joined, return_exceptions=True)
        await server.stop(grace=None)
        await host.thread.stop()


async def _drain(service: WorkerService, host: Host, store: StoreClient, config: WorkerConfig) -> None:
    """Lets the sequences come to their end, as long as that may take."""
    logger.info("draining worker=%s sequences=%d", config.id, len(host.sessions))
    tasks = [asyncio.create_task(service.drain()), asyncio.create_task(_until_lost(host, store))]
    try:
        await asyncio.wait(tasks, timeout=config.drain_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        logger.info("drained worker=%s sequences_left=%d", config.id, len(host.sessions))


async def _until_lost(host: Host, store: StoreClient) -> None:
    closed = asyncio.create_task(store.wait_closed())
    await asyncio.wait({closed, host.thread.ended}, return_when=asyncio.FIRST_COMPLETED)
    if host.thread.ended.done():
        host.thread.ended.result()
    raise StoreClosed("the connection to the store node is gone")
