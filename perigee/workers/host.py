"""What the roles share: the engine in its thread, the store node, and the way of each step's results."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from perigee.kvstore.blocks import KEY_BYTES, BlockKey, num_blocks
from perigee.kvstore.client import LeaseGroup, StoreClient
from perigee.kvstore.errors import NoRoom
from perigee.kvstore.messages import CommittedBlock, LeasedBlock, Reservation
from perigee.workers.config import Role, computes_prompts
from perigee.workers.engine.batcher import Active, Chunk, Output
from perigee.workers.engine.engine import Engine, StepResult
from perigee.workers.engine.sequence import FinishReason, Ref, Sequence
from perigee.workers.messages import StepOutput
from perigee.workers.session import KeyChain, Send, Session
from perigee.workers.thread import EngineThread
from perigee.workers.wire import outputs_to_pb, prefill_done_to_pb

# Blocks copied between two steps at the most, so that a long prompt's arrival does not hold up those being decoded.
LOAD_BATCH = 32

Commits = list[tuple[Session, CommittedBlock]]
Grown = list[tuple[Session, int]]


class WorkerBusy(Exception):
    """The worker has sequences, and what was asked for must wait until it has none."""


class Host:
    """One worker's engine, its store and its sessions."""

    def __init__(
        self, role: Role, engine: Engine, store: StoreClient, namespace: BlockKey, store_wait_s: float
    ) -> None:
        self.role = role
        self.store = store
        self.namespace = namespace
        self.store_wait_s = store_wait_s
        self.sessions: dict[Ref, Session] = {}
        self.vocab_size = engine.runner.model.config.vocab_size
        self.block_tokens = engine.runner.pool.layout.block_tokens
        self.thread = EngineThread(engine, self._on_step)
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()  # a session; replaced each time

    async def set_role(self, role: Role) -> None:
        """What comes from now on is done in this role. Raises WorkerBusy while there is any session."""
        if self.sessions:
            raise WorkerBusy(f"role: cannot become {role}, {len(self.sessions)} sequences are here as {self.role}")
        self.role = role
        await self.thread.call(self._limit_prompts, computes_prompts(role))  # before any sequence that comes now

    def _limit_prompts(self, just_in_time: bool) -> None:
        batcher = self.thread.engine.batcher
        batcher.limits = replace(batcher.limits, prompts_just_in_time=just_in_time)

    async def quiet(self) -> None:
        """Returns when there is no session."""
        while self.sessions:
            await self._closed.wait()

    def refusal(self, sequence: Sequence) -> str | None:
        """What is wrong with a sequence that came over the wire, or why it could never run here; else None."""
        expected = num_blocks(len(sequence.token_ids), self.block_tokens)
        if len(sequence.block_keys) != expected:
            return f"block_keys: has {len(sequence.block_keys)}, {len(sequence.token_ids)} tokens make {expected}"
        if any(len(key) != KEY_BYTES for key in sequence.block_keys):
            return f"block_keys: each key has {KEY_BYTES} bytes"
        if not 0 < sequence.prompt_len <= len(sequence.token_ids):
            return f"prompt_len: is {sequence.prompt_len}, must be from 1 to {len(sequence.token_ids)}"
        stop_ids = sequence.sampling.stop_token_ids
        for name, ids in (("token_ids", sequence.token_ids), ("stop_token_ids", stop_ids)):
            if max(ids, default=0) >= self.vocab_size:
                return f"{name}: has {max(ids)}, the vocabulary ends at {self.vocab_size - 1}"
        return self.thread.engine.batcher.refusal(sequence, self.role == "prefill")

    def wait_s(self, session: Session) -> float:
        """How long to wait for slots or blocks: as long as somebody waits for the sequence."""
        deadline_s = session.sequence.deadline_s
        return max(0.0, deadline_s - time.time()) if deadline_s else self.store_wait_s

    def open(self, sequence: Sequence, send: Send, rank: float) -> Session:
        session = Session(sequence, send, KeyChain(self.namespace, sequence, self.block_tokens), rank)
        self.sessions[session.ref] = session
        return session

    def close(self, session: Session) -> None:
        self.sessions.pop(session.ref, None)
        self._closed.set()
        self._closed = asyncio.Event()

    @asynccontextmanager
    async def leases(self) -> AsyncIterator[LeaseGroup]:
        """A group of leases and reservations. It ends after every copy that was begun from or into its slots."""
        group = self.store.group()
        try:
            yield group
        except BaseException:
            await self.thread.call(_nothing)
            raise
        finally:
            group.release()

    @asynccontextmanager
    async def pages(self, session: Session, *, one_token: bool) -> AsyncIterator[Active]:
        """Waits for the session's pages. They are freed after every copy that was begun from or into them."""
        try:
            yield await self.thread.admit(session.sequence, one_token=one_token, rank=session.rank)
        finally:
            await session.end_saves()
            await self.thread.remove(session.ref)

    async def load(self, active: Active, blocks: Iterable[LeasedBlock]) -> tuple[int, float]:
        """Copies leased blocks into the sequence's pages; returns how many tokens they hold, and the seconds that the
        copying took, without the steps between which it was done.
        """
        payloads = [(block.index, self.store.payload(block.slot)) for block in blocks]
        batches = [payloads[first : first + LOAD_BATCH] for first in range(0, len(payloads), LOAD_BATCH)]
        copied = [await self.thread.call(self._copy, active, batch) for batch in batches]
        return sum(tokens for tokens, _ in copied), sum(seconds for _, seconds in copied)

    def _copy(self, active: Active, batch: list[tuple[int, memoryview]]) -> tuple[int, float]:
        """In the engine's thread."""
        began = time.monotonic()
        return self.thread.engine.load_blocks(active, batch), time.monotonic() - began

    def _on_step(self, result: StepResult) -> None:
        """In the engine's thread: blocks that have a slot are written while their pages are at hand."""
        commits: Commits = []
        grown: Grown = []
        for chunk in result.chunks:
            if session := self.sessions.get(chunk.active.ref):
                self._note_start(session, chunk)
                for block in chunk.blocks(self.block_tokens):
                    if reservation := session.slots.pop(block, None):
                        commits.append((session, self._write(chunk.active, block, reservation)))
                    elif (block + 1) * self.block_tokens <= chunk.stop:
                        grown.append((session, block))
        self._loop.call_soon_threadsafe(self._stepped, commits, grown, result.outputs)

    def _note_start(self, session: Session, chunk: Chunk) -> None:
        if session.record and chunk.start == chunk.active.cached:
            session.record.started_at = time.monotonic() - self.thread.engine.totals.last_step_s

    def _write(self, active: Active, block: int, reservation: Reservation) -> CommittedBlock:
        payload = self.store.payload(reservation.slot)
        num_tokens, origin = self.thread.engine.save(active, block, payload)
        return CommittedBlock(reservation.slot, reservation.nonce, num_tokens, origin)

    def _stepped(self, commits: Commits, grown: Grown, outputs: tuple[Output, ...]) -> None:
        """On the event loop, after a step. Saves begin before anyone hears that a sequence is finished."""
        by_session: dict[Session, list[CommittedBlock]] = defaultdict(list)
        for session, block in commits:
            by_session[session].append(block)
        for session, blocks in by_session.items():
            if not session.is_ending:
                session.save(self._loop.create_task(self._commit(session, blocks)))
        for session, index in grown:
            if not session.is_ending:
                session.save(self._loop.create_task(self._save(session, index)))
        self._publish(outputs)

    async def _commit(self, session: Session, blocks: list[CommittedBlock]) -> None:
        assert session.group is not None
        await session.group.commit(blocks)

    async def _save(self, session: Session, index: int) -> None:
        """Puts a block that grew while decoding into the store, if there is room."""
        assert session.active is not None
        parent, key = session.chain.key(index, session.active.tokens)
        with suppress(NoRoom):
            async with self.leases() as group:
                acquired = await group.acquire([key], parent, wait_s=0)
                for reservation in acquired.reserved:
                    written = await self.thread.call(self._write, session.active, index, reservation)
                    await group.commit([written])

    def _publish(self, outputs: tuple[Output, ...]) -> None:
        """One message to each server, with all that the step produced for it."""
        batches: dict[Send, list[StepOutput]] = defaultdict(list)
        for output in outputs:
            if session := self.sessions.get(output.active.ref):
                if session.record:
                    session.send(prefill_done_to_pb(session.record.done(output, time.monotonic())))
                    session.record = None
                else:
                    batches[session.send].append(
                        StepOutput(session.ref, output.index, output.token, output.finish_reason)
                    )
                session.sampled.set()
                if output.finish_reason is not FinishReason.NOT_FINISHED:
                    session.finished.set()
        for send, batch in batches.items():
            send(outputs_to_pb(batch))


def _nothing() -> None:
    """Called through the engine's thread, to know that all before it has run."""
