"""A store node: the process that keeps the blocks of one host."""

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from pathlib import Path

import grpc

from perigee.kvstore import store_pb2_grpc as rpc
from perigee.kvstore.addresses import announced, join
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.directory import Member, stay_joined, watch
from perigee.kvstore.dram import Mapping, allocate
from perigee.kvstore.errors import StoreError
from perigee.kvstore.feed import Feed
from perigee.kvstore.local import LocalServer
from perigee.kvstore.opening import StoreHost
from perigee.kvstore.peers import Peers
from perigee.kvstore.service import StoreNode
from perigee.kvstore.source import StoreSource
from perigee.kvstore.transfer import listening
from perigee.kvstore.transfer.base import Transfer
from perigee.kvstore.transfer.mooncake import MooncakeEngine, MooncakeTransfer
from perigee.kvstore.transfer.serving import Limits, Segment
from perigee.kvstore.transfer.tcp import TcpTransfer
from perigee.kvstore.transfer.tcp_server import TransferServer

_log = logging.getLogger(__name__)


async def run(config: StoreConfig) -> None:
    """Serves until cancelled. Raises StoreError if an address cannot be listened on or the memory is not there."""
    _check_memory(config.dram_bytes)
    async with contextlib.AsyncExitStack() as closing:
        closing.callback(_log.info, "node stopped node=%s", config.id)
        mapping = Mapping(allocate(config.dram_bytes), config.dram_bytes)
        closing.callback(mapping.close)
        await _Node(config, mapping).run()


class _Node:
    """The parts of a node, and the order in which they begin and end."""

    def __init__(self, config: StoreConfig, mapping: Mapping) -> None:
        self._config = config
        self._mapping = mapping
        self._incarnation = uuid.uuid4().hex
        self._feed = Feed(config.id, self._incarnation)
        self._peers = Peers()

    async def run(self) -> None:
        config = self._config
        async with contextlib.AsyncExitStack() as closing:
            transfer, segment = _transfer(config, self._mapping)
            closing.push_async_callback(transfer.close)
            host = StoreHost(config, self._mapping, self._feed, transfer, self._peers)
            closing.push_async_callback(host.close)
            local = LocalServer(config.id, self._incarnation, config.socket, self._mapping, host)
            closing.callback(local.close)
            secret = config.access.cluster_secret
            server = TransferServer(
                config.id,
                config.transfer_listen,
                StoreSource(host.opened),
                secret=secret,
                limits=Limits(lease_s=config.transfer_lease_s),
                segment=segment,
            )
            closing.callback(server.close)
            await self._serve(host, local, server)

    async def _serve(self, host: StoreHost, local: LocalServer, transfer: TransferServer) -> None:
        config = self._config
        # Two nodes on one port would share its connections between them unnoticed: rather fail.
        server = config.access.server([("grpc.so_reuseport", 0)])
        service = StoreNode(config.id, self._incarnation, host, transfer, self._feed)
        rpc.add_StoreNodeServicer_to_server(service, server)
        address = _bind(server, config)
        await server.start()
        try:
            # Whoever connects meanwhile waits in the socket's backlog: nobody gets memory that is not there.
            await asyncio.to_thread(self._mapping.populate)
            _log.info("node started node=%s address=%s dram_bytes=%d", config.id, address, config.dram_bytes)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stay_joined(config.directory, self._member(address, transfer), config.access))
                tasks.create_task(self._peers.follow(watch(config.directory, config.access)))
                tasks.create_task(transfer.serve())
                tasks.create_task(local.serve())
        finally:
            await server.stop(grace=None)

    def _member(self, address: str, transfer: TransferServer) -> Member:
        config = self._config
        host, port = listening.split(transfer.address)
        return Member(
            id=config.id,
            incarnation=self._incarnation,
            kind="store",
            address=address,
            pid=os.getpid(),
            host=socket.gethostname(),
            transfer_address=join(config.advertise or host, port),
        )


def _transfer(config: StoreConfig, mapping: Mapping) -> tuple[Transfer, Segment | None]:
    """How blocks come from other nodes, and what those need who read this node's memory."""
    secret = config.access.cluster_secret
    if config.transfer == "tcp":
        return TcpTransfer(secret), None
    host, _ = listening.split(config.transfer_listen)
    engine = MooncakeEngine(config.advertise or host, mapping.view(0, mapping.size_bytes))
    return MooncakeTransfer(engine, secret), engine


def _check_memory(dram_bytes: int) -> None:
    """The kernel would promise more than there is, and kill somebody when it is used."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].removesuffix("kB")) * 1024
    if dram_bytes > available:
        raise StoreError(f"dram_bytes: {dram_bytes}; {available} bytes of memory are available")


def _bind(server: grpc.aio.Server, config: StoreConfig) -> str:
    """The gRPC target under which others reach what listens on `config.listen`, where port 0 is any free one."""
    try:
        port = server.add_insecure_port(config.listen)
    except RuntimeError as error:
        raise StoreError(f"listen: cannot listen on {config.listen!r}") from error
    return announced(config.listen, port, config.advertise)
