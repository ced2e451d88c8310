"""A worker as a process: its gRPC service, its place in the directory, and its end."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
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
from perigee.workers.config import WorkerConfig
from perigee.workers.engine.engine import EngineLoad
from perigee.workers.host import Host
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


class WorkerService(WorkerServicer):
    """Answers `Attach` and `Watch` for one host."""

    def __init__(self, host: Host, config: WorkerConfig, card: ModelCard, incarnation: str) -> None:
        self._host = host
        self._config = config
        self._card = card
        self._incarnation = incarnation

    async def Attach(
        self, request_iterator: AsyncIterator[pb.ToWorker], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.FromWorker]:
        """One server's stream. What it started ends with it."""
        async for message in ServerStream(self._host).converse(request_iterator):
            yield message

    async def Watch(
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WorkerReport]:
        """The state now, on change, and every 250 ms."""
        while True:
            load = self._host.thread.load
            yield report_to_pb(self._report(load))
            await self._change(load)

    def _report(self, load: EngineLoad) -> WorkerReport:
        totals = self._host.thread.engine.totals
        return WorkerReport(
            worker_id=self._config.id,
            incarnation=self._incarnation,
            role=self._config.role,
            card=self._card,
            last_step_s=totals.last_step_s,
            computed_prompt_tokens_total=totals.computed_prompt_tokens,
            cached_prompt_tokens_total=totals.cached_prompt_tokens,
            output_tokens_total=totals.output_tokens,
            steps_total=totals.steps,
            **asdict(load),
        )

    async def _change(self, load: EngineLoad) -> None:
        """Returns when the load is another, at the latest after REPORT_MAX_S."""
        for _ in range(round(REPORT_MAX_S / REPORT_MIN_S)):
            await asyncio.sleep(REPORT_MIN_S)
            if self._host.thread.load != load:
                return


async def run(config: WorkerConfig) -> None:
    """Serves until cancelled, or until the engine or the store node is gone: then it raises."""
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
    add_WorkerServicer_to_server(WorkerService(host, config, card, incarnation), server)
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
    finally:
        joined.cancel()
        await asyncio.gather(joined, return_exceptions=True)
        await server.stop(grace=None)
        await host.thread.stop()


async def _until_lost(host: Host, store: StoreClient) -> None:
    closed = asyncio.create_task(store.wait_closed())
    await asyncio.wait({closed, host.thread.ended}, return_when=asyncio.FIRST_COMPLETED)
    if host.thread.ended.done():
        host.thread.ended.result()
    raise StoreClosed("the connection to the store node is gone")
