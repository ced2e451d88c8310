"""A store node as the rest of the cluster sees it: gRPC, control only."""

import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore import store_pb2_grpc as rpc
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.copies import replicate
from perigee.kvstore.driver import Driver
from perigee.kvstore.errors import InvalidRequest, QuotaExceeded, TooLarge
from perigee.kvstore.feed import Feed
from perigee.kvstore.opening import StoreHost
from perigee.kvstore.transfer.tcp_server import TransferServer

_log = logging.getLogger(__name__)


class StoreNode(rpc.StoreNodeServicer):
    """The node's face towards the rest of the cluster."""

    def __init__(self, node_id: str, incarnation: str, host: StoreHost, transfer: TransferServer, feed: Feed) -> None:
        self._node_id = node_id
        self._incarnation = incarnation
        self._host = host
        self._transfer = transfer
        self._feed = feed

    async def Watch(
        self, request: pb.WatchRequest, context: "grpc.aio.ServicerContext[pb.WatchRequest, pb.BlockEvents]"
    ) -> AsyncIterator[pb.BlockEvents]:
        driver = self._host.driver
        subscription = self._feed.subscribe(driver.store.snapshot() if driver else [])
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
        if self._host.driver:
            _describe(self._host, self._host.driver, status)
        status.served_total = self._transfer.served.blocks_total
        status.fenced_total += self._transfer.served.fenced_total
        return status

    async def Pin(self, request: pb.Pin, context: "grpc.aio.ServicerContext[pb.Pin, pb.Pinned]") -> pb.Pinned:
        driver = await self._driver(context)
        try:
            return pb.Pinned(pinned=driver.store.pin(request.tenant, _keys(request.keys), request.ttl_s, driver.now))
        except QuotaExceeded as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            driver.finish([])

    async def Unpin(self, request: pb.Unpin, context: "grpc.aio.ServicerContext[pb.Unpin, pb.Unpinned]") -> pb.Unpinned:
        driver = await self._driver(context)
        driver.finish(driver.store.unpin(request.tenant, _keys(request.keys), driver.now))
        return pb.Unpinned()

    async def Replicate(
        self, request: pb.ReplicateRequest, context: "grpc.aio.ServicerContext[pb.ReplicateRequest, pb.Replicated]"
    ) -> pb.Replicated:
        driver, source = await self._driver(context), request.source
        if source in ("", self._node_id):
            text = f"source: is {source!r}, allowed are other nodes than this one, {self._node_id!r}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        try:
            pulled, missing = await replicate(driver, source, _keys(request.keys), BlockKey(request.parent))
        except TooLarge as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        _log.info("replicated source=%s blocks=%d missing=%d", source, pulled, missing)
        return pb.Replicated(pulled=pulled, missing=missing)

    async def Trim(
        self, request: pb.TrimRequest, context: "grpc.aio.ServicerContext[pb.TrimRequest, pb.Trimmed]"
    ) -> pb.Trimmed:
        driver = await self._driver(context)
        try:
            trimmed, answers = driver.store.trim(_keys(request.keys), driver.now)
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        driver.finish(answers)
        _log.info("trimmed blocks=%d asked=%d", trimmed, len(request.keys))
        return pb.Trimmed(trimmed=trimmed)

    async def _driver(self, context: "grpc.aio.ServicerContext[Any, Any]") -> Driver:
        if self._host.driver is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no worker has connected yet, so there are no blocks")
        return self._host.driver


def _keys(keys: Iterable[bytes]) -> list[BlockKey]:
    return [BlockKey(key) for key in keys]


def _describe(host: StoreHost, driver: Driver, status: pb.StoreStatus) -> None:
    store, index, totals = driver.store, driver.store.index, driver.store.totals
    status.slot_bytes = driver.arena.slot_bytes
    status.num_slots = index.num_slots
    status.committed_blocks = len(index)
    status.leased_blocks = index.num_leased
    status.reserved_blocks = index.num_reserved
    status.orphaned_blocks = index.orphaned(driver.living)
    status.free_slots = index.free_slots
    status.stored_total = index.stored_total
    status.evicted_total = index.evicted_total
    status.hit_blocks_total = totals.hit_blocks
    status.miss_blocks_total = totals.miss_blocks
    status.connections = len(driver.living)
    status.pinned_blocks = len(store.pins)
    status.fenced_total = index.fenced_total
    status.overdue_blocks = index.num_overdue(driver.now)
    status.pulled_total = totals.pulled_blocks
    status.failed_pulls_total = totals.failed_pulls
    status.replicated_total = totals.replicated_blocks
    status.trimmed_total = totals.trimmed_blocks
    status.remote_corrupt_total = host.transfer.corrupt_received_total
    _describe_ssd(host, driver, status)


def _describe_ssd(host: StoreHost, driver: Driver, status: pb.StoreStatus) -> None:
    ssd, totals = driver.store.ssd, driver.store.totals
    status.ssd_state = host.ssd_state
    status.ssd_blocks = len(ssd) if ssd else 0
    status.ssd_hit_blocks_total = totals.hit_ssd_blocks
    status.ssd_loaded_total = totals.loaded_blocks
    status.ssd_spilled_total = totals.spilled_blocks
    status.ssd_corrupt_total = host.log.torn_records + host.log.corrupt_records if host.log else 0
