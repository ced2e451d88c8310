"""A store node: the process that keeps the blocks of one host."""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore import store_pb2_grpc as rpc
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.directory import Member, stay_joined
from perigee.kvstore.dram import Mapping, allocate
from perigee.kvstore.errors import StoreError
from perigee.kvstore.feed import Feed
from perigee.kvstore.local import LocalServer
from perigee.kvstore.messages import BlockEvent
from perigee.kvstore.store import Store

_log = logging.getLogger(__name__)


async def run(config: StoreConfig) -> None:
    """Serves until cancelled. Raises StoreError if an address cannot be listened on or the memory is not there."""
    incarnation = uuid.uuid4().hex
    feed = Feed(config.id, incarnation)
    _check_memory(config.dram_bytes)
    mapping = Mapping(allocate(config.dram_bytes), config.dram_bytes)
    try:
        local = LocalServer(config.id, incarnation, config.socket, mapping, feed)
        try:
            await _serve(config, incarnation, local, mapping, feed)
        finally:
            local.close()
    finally:
        mapping.close()
        _log.info("node stopped node=%s", config.id)


def _check_memory(dram_bytes: int) -> None:
    """The kernel would promise more than there is, and kill somebody when it is used."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].removesuffix("kB")) * 1024
    if dram_bytes > available:
        raise StoreError(f"dram_bytes: {dram_bytes}; {available} bytes of memory are available")


async def _serve(config: StoreConfig, incarnation: str, local: LocalServer, mapping: Mapping, feed: Feed) -> None:
    # Two nodes on one port would share its connections between them unnoticed: rather fail.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    rpc.add_StoreNodeServicer_to_server(StoreNode(config.id, incarnation, local, feed), server)
    address = _bind(server, config.listen)
    await server.start()
    try:
        # Whoever connects meanwhile waits in the socket's backlog: nobody gets memory that is not there.
        await asyncio.to_thread(mapping.populate)
        _log.info("node started node=%s address=%s dram_bytes=%d", config.id, address, config.dram_bytes)
        member = Member(config.id, incarnation, "store", address, os.getpid(), socket.gethostname())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stay_joined(config.directory, member))
            tasks.create_task(local.serve())
    finally:
        await server.stop(grace=None)


def _bind(server: grpc.aio.Server, listen: str) -> str:
    """The gRPC target under which others reach what listens on `listen`, where port 0 is any free one."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise StoreError(f"listen: cannot listen on {listen!r}") from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


class StoreNode(rpc.StoreNodeServicer):
    """The node's face towards the rest of the cluster."""

    def __init__(self, node_id: str, incarnation: str, local: LocalServer, feed: Feed) -> None:
        self._node_id = node_id
        self._incarnation = incarnation
        self._local = local
        self._feed = feed

    async def Watch(
        self, request: pb.WatchRequest, context: "grpc.aio.ServicerContext[pb.WatchRequest, pb.BlockEvents]"
    ) -> AsyncIterator[pb.BlockEvents]:
        subscription = self._feed.subscribe(self._snapshot())
        try:
            async for message in subscription.messages():
                yield message
        finally:
            self._feed.unsubscribe(subscription)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too far behind; watch again for a new snapshot")

    async def Status(
        self, request: pb.StatusRequest, context: "grpc.aio.ServicerContext[pb.StatusRequest, pb.StoreStatus]"
    ) -> pb.StoreStatus:
        status = pb.StoreStatus(node_id=self._node_id, incarnation=self._incarnation)
        if sessions := self._local.sessions:
            status.connections = len(sessions.living)
            status.orphaned_blocks = sessions.store.index.orphaned(sessions.living)
            _describe(sessions.store, status)
        return status

    def _snapshot(self) -> list[BlockEvent]:
        sessions = self._local.sessions
        return [BlockEvent(True, key) for key in sessions.store.index.committed_keys()] if sessions else []


def _describe(store: Store, status: pb.StoreStatus) -> None:
    index = store.index
    status.slot_bytes = store.arena.slot_bytes
    status.num_slots = index.num_slots
    status.committed_blocks = len(index)
    status.leased_blocks = index.num_leased
    status.reserved_blocks = index.num_reserved
    status.free_slots = index.free_slots
    status.stored_total = index.stored_total
    status.evicted_total = index.evicted_total
    status.hit_blocks_total = store.hit_blocks_total
    status.miss_blocks_total = store.miss_blocks_total
