"""Prefill: computes what the cache lacks of a prompt, commits each block once it is computed, samples one token."""

import time

from perigee.kvstore.client import LeaseGroup
from perigee.workers.engine.batcher import Active
from perigee.workers.engine.sequence import FinishReason
from perigee.workers.host import Host
from perigee.workers.session import PrefillRecord, Session


async def prefill(host: Host, session: Session) -> None:
    """One attempt's prefill, and in a mixed worker the rest of it too.

    The leases on its blocks outlive its pages: they hold until decode has joined, or the server forgets the attempt.
    """
    hands_over = host.role == "prefill"
    session.record = PrefillRecord(arrived_at=time.monotonic())
    async with host.leases() as group:
        async with host.pages(session, one_token=hands_over) as active:
            session.active = active
            await _load_prefix(host, session, active, group)
            await (session.sampled if hands_over else session.finished).wait()
            await session.saved()
        if hands_over and active.finish_reason is FinishReason.NOT_FINISHED:
            await session.joined.wait()


async def _load_prefix(host: Host, session: Session, active: Active, group: LeaseGroup) -> None:
    """Leases and copies what is cached, takes slots for the rest, and lets the engine compute that."""
    assert session.record is not None
    began = time.monotonic()
    acquired = await group.acquire(session.sequence.block_keys, host.namespace, host.wait_s(session))
    loaded = await host.load(active, acquired.leased)
    session.record.leased = acquired.leased
    session.record.load_s = time.monotonic() - began
    session.slots = {reservation.index: reservation for reservation in acquired.reserved}
    session.group = group
    await host.thread.call(host.thread.engine.ready, active, loaded)
