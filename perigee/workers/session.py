"""One attempt on one worker, from the first message about it to the last."""

import asyncio
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field

from perigee.kvstore.blocks import NO_SALT, BlockKey, next_key
from perigee.kvstore.client import LeaseGroup
from perigee.kvstore.messages import LeasedBlock, Reservation, Tier
from perigee.workers import worker_pb2 as pb
from perigee.workers.engine.batcher import Active, Output
from perigee.workers.engine.sequence import Ref, Sequence
from perigee.workers.messages import PrefillDone

Send = Callable[[pb.FromWorker], None]


class KeyChain:
    """The keys of a sequence's full blocks, extended as it grows."""

    def __init__(self, root: BlockKey, sequence: Sequence, block_tokens: int) -> None:
        self._root = root
        self._salt = sequence.salt
        self._salt_block = sequence.salt_block
        self._block_tokens = block_tokens
        self._keys = list(sequence.block_keys[: len(sequence.token_ids) // block_tokens])

    def key(self, block: int, tokens: Callable[[int, int], abc.Sequence[int]]) -> tuple[BlockKey, BlockKey]:
        """(parent, key) of a full block of the sequence. `tokens` gives those that it has by now, from one position up
        to another.
        """
        while len(self._keys) <= block:
            index = len(self._keys)
            own = tokens(index * self._block_tokens, (index + 1) * self._block_tokens)
            salt = self._salt if index == self._salt_block else NO_SALT
            self._keys.append(next_key(self._keys[-1] if self._keys else self._root, own, salt))
        return (self._keys[block - 1] if block else self._root), self._keys[block]


@dataclass(slots=True)
class PrefillRecord:
    """What `PrefillDone` tells beside the token. Times are of one monotonic clock, in seconds."""

    arrived_at: float
    load_s: float = 0.0
    started_at: float = 0.0  # of the first chunk; the engine's thread sets it
    leased: tuple[LeasedBlock, ...] = ()

    def done(self, output: Output, now: float) -> PrefillDone:
        return PrefillDone(
            ref=output.active.ref,
            token=output.token,
            finish_reason=output.finish_reason,
            cached_tokens_dram=self._cached(output, Tier.DRAM),
            cached_tokens_ssd=self._cached(output, Tier.SSD),
            cached_tokens_remote=self._cached(output, None),
            queue_s=self.started_at - self.arrived_at - self.load_s,
            load_s=self.load_s,
            compute_s=now - self.started_at,
        )

    def _cached(self, output: Output, tier: Tier | None) -> int:
        """Tokens of prompt and earlier output that came from `tier`, or with None from another node."""
        tokens = 0
        left = output.active.cached  # the last token is computed even when its block was cached
        for block in self.leased:
            used = min(block.num_tokens, left)
            left -= used
            if (None if block.remote else block.tier) == tier:
                tokens += used
        return tokens


@dataclass(slots=True, eq=False)
class Session:
    """What the roles know of an attempt; they change it on the event loop only.

    `slots` and `record` are complete before the sequence is made ready; then the engine's thread reads them, and takes
    each slot out as it writes it.
    """

    sequence: Sequence  # as it was opened; its block keys name what decode fetches
    send: Send  # to the server that owns the request
    chain: KeyChain
    rank: float = 0.0  # its place among those that wait for pages
    active: Active | None = None  # once it holds pages
    group: LeaseGroup | None = None  # prefill: of its leases and reservations
    record: PrefillRecord | None = None  # until the first token is out, where this worker prefills
    slots: dict[int, Reservation] = field(default_factory=dict)  # block index → where it goes
    saves: set[asyncio.Task[None]] = field(default_factory=set)  # blocks on their way into the store
    failure: BaseException | None = None  # of the first save that failed
    is_ending: bool = False  # its pages are about to go: nothing more is saved from them
    first: Sequence | None = None  # decode: `sequence` with the token that prefill sampled, once it is `started`
    started: asyncio.Event = field(default_factory=asyncio.Event)
    sampled: asyncio.Event = field(default_factory=asyncio.Event)  # the first token is out
    finished: asyncio.Event = field(default_factory=asyncio.Event)  # the last token is out
    joined: asyncio.Event = field(default_factory=asyncio.Event)  # prefill: decode has the blocks

    @property
    def ref(self) -> Ref:
        return self.sequence.ref

    def start(self, sequence: Sequence) -> None:
        """Decode: `sequence` is what was prepared, with the token that prefill sampled. It may come at any time.

        Raises ValueError if it is anything else.
        """
        if sequence.token_ids[:-1] != self.sequence.token_ids:
            raise ValueError("token_ids: must be those of Prepare and one more")
        self.first = sequence
        self.started.set()

    async def saved(self) -> None:
        """Waits until every block that was computed so far is in the store. Raises what went wrong with any."""
        while self.saves:
            await asyncio.wait(self.saves)
        if self.failure:
            raise self.failure

    def save(self, task: "asyncio.Task[None]") -> None:
        self.saves.add(task)
        task.add_done_callback(self._saved)

    async def end_saves(self) -> None:
        """Ends what is still being saved, and lets nothing begin."""
        self.is_ending = True
        for task in self.saves:
            task.cancel()
        while self.saves:
            await asyncio.wait(self.saves)

    def _saved(self, task: "asyncio.Task[None]") -> None:
        self.saves.discard(task)
        if not task.cancelled():
            self.failure = self.failure or task.exception()
