"""Decode: maps the blocks that prefill commits into pages of its own, then generates token by token."""

from perigee.workers.host import Host
from perigee.workers.messages import DecodeJoined
from perigee.workers.session import Session
from perigee.workers.wire import joined_to_pb


async def decode(host: Host, session: Session, source: str) -> None:
    """One attempt's decoding. It never computes a prompt token: what does not arrive fails the attempt.

    Raises BlocksMissing if prefill's blocks do not come in time.
    """
    async with host.pages(session, one_token=False) as active:
        session.active = active
        async with host.leases() as group:
            async for blocks in group.fetch(session.sequence.block_keys, host.wait_s(session), source, host.namespace):
                await host.load(active, blocks)
        await session.started.wait()
        assert session.first is not None
        session.send(joined_to_pb(DecodeJoined(session.ref)))  # before the first step can say anything
        await host.thread.call(host.thread.engine.join, active, session.first)
        await session.finished.wait()
        await session.saved()
