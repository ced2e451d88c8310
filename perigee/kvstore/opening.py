"""How a node's store comes to be: its first worker says how large a block is, which decides everything else."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import ALIGNMENT, LAYOUT_VERSION
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.disk_jobs import SsdJobs
from perigee.kvstore.dram import Arena, Mapping
from perigee.kvstore.driver import Driver
from perigee.kvstore.errors import InvalidRequest, TierFailed
from perigee.kvstore.evict import make_policy
from perigee.kvstore.feed import Feed
from perigee.kvstore.limits import StoreLimits
from perigee.kvstore.peers import Peers, Pulls
from perigee.kvstore.records import fitting_segment_bytes
from perigee.kvstore.ssd import SegmentLog
from perigee.kvstore.ssd_index import SsdIndex
from perigee.kvstore.ssd_tier import SsdTier
from perigee.kvstore.store import Store
from perigee.kvstore.transfer.base import Transfer

_log = logging.getLogger(__name__)


class StoreHost:
    """Opens the store once, and closes it. Owns what its jobs are done with, except for `transfer` and the memory."""

    def __init__(self, config: StoreConfig, mapping: Mapping, feed: Feed, transfer: Transfer, peers: Peers) -> None:
        self.driver: Driver | None = None
        self.log: SegmentLog | None = None
        self.transfer = transfer
        self._config = config
        self._mapping = mapping
        self._feed = feed
        self._peers = peers
        self._opening = asyncio.Lock()
        self._opened = asyncio.Event()
        self._pulls: Pulls | None = None
        self._disk: SsdJobs | None = None
        self._threads = ThreadPoolExecutor(config.ssd_threads, "perigee-ssd")

    @property
    def ssd_state(self) -> pb.SsdState.ValueType:
        """How the SSD tier is doing."""
        if self.driver is None or self._config.ssd_folder is None:
            return pb.SSD_NONE
        ssd = self.driver.store.ssd
        return pb.SSD_FAILED if ssd is None or ssd.is_off else pb.SSD_ON

    async def opened(self) -> Driver:
        """The driver, as soon as there is one."""
        await self._opened.wait()
        assert self.driver is not None
        return self.driver

    async def open_for(self, payload_bytes: int, block_tokens: int) -> Driver:
        """The driver for a worker whose blocks are like this. Raises InvalidRequest if those kept here are not."""
        async with self._opening:
            if self.driver is None:
                await self._open(self._arena(payload_bytes, block_tokens), block_tokens)
        driver = await self.opened()
        _check_equal("payload_bytes", payload_bytes, driver.arena.slot_bytes)
        _check_equal("block_tokens", block_tokens, driver.store.block_tokens)
        return driver

    async def close(self) -> None:
        """Ends all jobs. When it returns nobody touches a slot any more."""
        if self.driver:
            self.driver.close()
        if self._pulls:
            await self._pulls.close()
        if self._disk:
            await self._disk.drained()
        await asyncio.to_thread(self._threads.shutdown)
        if self.log:
            self.log.close()

    def _arena(self, payload_bytes: int, block_tokens: int) -> Arena:
        if payload_bytes <= 0 or payload_bytes % ALIGNMENT:
            raise InvalidRequest(f"payload_bytes: {payload_bytes}; allowed are positive multiples of {ALIGNMENT}")
        if block_tokens <= 0:
            raise InvalidRequest(f"block_tokens: {block_tokens}; allowed is anything above 0")
        arena = Arena(self._mapping, payload_bytes)
        if arena.num_slots == 0:
            size_bytes = self._mapping.size_bytes
            raise InvalidRequest(f"dram_bytes: the node's {size_bytes} hold no payload of {payload_bytes} bytes")
        return arena

    async def _open(self, arena: Arena, block_tokens: int) -> None:
        config = self._config
        self.log = await self._open_log(arena.slot_bytes, block_tokens)
        limits = StoreLimits.of(
            arena.num_slots,
            reservation_s=config.reservation_s,
            pin_share=config.pin_share,
            free_share=config.free_share,
        )
        policy = make_policy(config.eviction, arena.num_slots)
        store = Store(arena.num_slots, block_tokens, policy, limits, _tier(self.log, block_tokens))
        driver = self.driver = Driver(store, arena, self._feed)
        self._disk = SsdJobs(self.log, driver, self._threads, config.ssd_timeout_s) if self.log else None
        self._pulls = Pulls(self.transfer, driver, self._peers)
        driver.employ(self._disk, self._pulls)
        self._feed.resize(arena.num_slots)
        self._feed.publish(store.snapshot())
        self._opened.set()
        _log.info("store opened node=%s slots=%d slot_bytes=%d", config.id, arena.num_slots, arena.slot_bytes)

    async def _open_log(self, slot_bytes: int, block_tokens: int) -> SegmentLog | None:
        """None if there is to be no SSD tier, or cannot be one."""
        config = self._config
        if config.ssd_folder is None:
            return None
        try:
            return await asyncio.to_thread(
                SegmentLog.open,
                config.ssd_folder,
                slot_bytes=slot_bytes,
                capacity_bytes=config.ssd_bytes,
                segment_bytes=fitting_segment_bytes(slot_bytes, config.ssd_bytes),
                namespace=f"layout {LAYOUT_VERSION}, {block_tokens} tokens".encode(),
            )
        except TierFailed as error:
            _log.error("ssd tier off, serving goes on without it node=%s error=%s", config.id, error)
            return None


def _tier(log: SegmentLog | None, block_tokens: int) -> SsdTier | None:
    if log is None:
        return None
    return SsdTier(SsdIndex(log.num_segments, log.layout.records_per_segment, log.recovered), block_tokens)


def _check_equal(field: str, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise InvalidRequest(f"{field}: {theirs} is not the {ours} that the first worker of this node fixed")
