"""Prefill: computes what the cache lacks of a prompt, commits each block once it is computed, samples one token."""

import time
from contextlib import suppress
from dataclasses import replace

from perigee.kvstore.client import BlocksMissing, LeaseGroup
from perigee.workers.engine.batcher import Active
from perigee.workers.engine.sequence import FinishReason
from perigee.workers.host import Host
from perigee.workers.session import PrefillRecord, Session


async def prefill(host: Host, session: Session, source: str) -> None:
    """One attempt's prefill, and in a mixed worker the rest of it too.

    What the store node `source`, if one is named, has of the prompt and the local one lacks is pulled first.

    The leases on its blocks outlive its pages: they hold until decode has joined, or the server forgets the attempt.
    """
    hands_over = host.role == "prefill"
    session.record = PrefillRecord(arrived_at=time.monotonic())
    async with host.leases() as group:
        async with host.pages(session, one_token=hands_over) as active:
            session.active = active
            await _load_prefix(host, session, active, group, source)
            await (session.sampled if hands_over else session.finished).wait()
            await session.saved()
        if hands_over and active.finish_reason is FinishReason.NOT_FINISHED:
            await session.joined.wait()


async def _load_prefix(host: Host, session: Session, active: Active, group: LeaseGroup, source: str) -> None:
    """Leases and copies what is cached, takes slots for the rest, and lets the engine compute that."""
    assert session.record is not None
    began = time.monotonic()
    pulled = await _pull(host, session, group, source) if source else set()
    acquired = await group.acquire(session.sequence.block_keys, host.namespace, host.wait_s(session))
    leased_s = time.monotonic() - began
    loaded, copied_s = await host.load(active, acquired.leased)
    session.record.leased = tuple(replace(block, remote=block.index in pulled) for block in acquired.leased)
    session.record.load_s = leased_s + copied_s
    session.slots = {reservation.index: reservation for reservation in acquired.reserved}
    session.group = group
    await host.thread.call(host.thread.engine.ready, active, loaded)


async def _pull(host: Host, session: Session, group: LeaseGroup, source: str) -> set[int]:
    """The indices of the blocks that came from `source`. What is not there now is computed here instead."""
    pulled: set[int] = set()
    with suppress(BlocksMissing):
        async for blocks in group.fetch(session.sequence.block_keys, 0.0, source, host.namespace):
            pulled.update(block.index for block in blocks if block.remote)
    return pulled
