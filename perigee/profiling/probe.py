"""Talks to one worker as a front end does, past the Conductor, and sees how long things take there."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from itertools import count, pairwise
from statistics import median

from perigee.kvstore.access import Access
from perigee.kvstore.blocks import chain
from perigee.profiling.cluster import Card, Worker
from perigee.profiling.errors import ProfilingError
from perigee.scheduler.cost.fit import StepSample
from perigee.workers import messages
from perigee.workers.client import AttemptChannel, WorkerClient
from perigee.workers.engine.sequence import Ref, Sampling
from perigee.workers.engine.sequence import Sequence as TokenSequence

# Output tokens that a sequence may come to: it is cancelled when enough steps were seen.
MAX_OUTPUT_TOKENS = 128

# Steps of a whole batch of which the median counts.
_STEPS = 10


class Probe:
    """One worker under measurement. `requests` numbers what is asked of all workers of a run."""

    def __init__(self, worker: Worker, card: Card, client: WorkerClient, run_id: str) -> None:
        self.worker = worker
        self.card = card
        self._client = client
        self._run_id = run_id
        self._count = count()

    @classmethod
    @asynccontextmanager
    async def attached(cls, worker: Worker, card: Card, access: Access, run_id: str) -> AsyncIterator["Probe"]:
        """A probe whose stream is closed when the context is left: the worker then forgets all that it asked for."""
        client = await WorkerClient.connect(worker.id, worker.address, access)
        try:
            yield cls(worker, card, client, run_id)
        finally:
            await client.close()

    async def prefill(self, token_ids: Sequence[int], source: str = "") -> messages.PrefillDone:
        """Computes what the cache lacks of a prompt, pulling from the store node `source` if one is named."""
        sequence = self._sequence(token_ids, max_tokens=1)
        with self._client.open(sequence.ref) as channel:
            channel.start(sequence, source)
            return await self._first_token(channel)

    async def steps(self, token_ids: Sequence[int], first: int, batch: int, source: str = "") -> StepSample:
        """Decodes `batch` sequences that begin alike, with `first` after a prompt that is in the store already, and
        go on at random. The median step while all of them ran."""
        watch = _StepWatch(len(token_ids), batch)
        with ExitStack() as channels:
            decoding = [channels.enter_context(self._decoding(token_ids, first, seed, source)) for seed in range(batch)]
            try:
                await self._watch(decoding, watch)
            finally:
                for channel in decoding:
                    channel.cancel()
        return watch.sample()

    async def _watch(self, decoding: Sequence[AttemptChannel], watch: "_StepWatch") -> None:
        """Listens to all until enough was seen. Raises ProfilingError if one fails."""
        try:
            async with asyncio.TaskGroup() as tasks:
                listeners = [tasks.create_task(self._listen(each, watch, i)) for i, each in enumerate(decoding)]
                await watch.seen_enough()
                for listener in listeners:
                    listener.cancel()
        except* ProfilingError as errors:
            raise errors.exceptions[0] from errors

    def _decoding(self, token_ids: Sequence[int], first: int, seed: int, source: str) -> AttemptChannel:
        """A sequence that the worker begins to decode. A mixed one takes its prompt from the store itself."""
        sequence = self._sequence(token_ids, MAX_OUTPUT_TOKENS, seed)
        channel = self._client.open(sequence.ref)
        if self.worker.role == "mixed":
            channel.start(sequence, source)
        else:
            channel.prepare(sequence, source)
            channel.start(self._sequence([*token_ids, first], MAX_OUTPUT_TOKENS, seed, sequence.ref), source)
        return channel

    async def _listen(self, channel: AttemptChannel, watch: "_StepWatch", index: int) -> None:
        while True:
            message = await self._receive(channel)
            if isinstance(message, messages.StepOutput):
                watch.note(index, time.perf_counter())
                if message.finish_reason:
                    raise ProfilingError(f"worker {self.worker.id}: a sequence ended before all of its batch ran")

    async def _first_token(self, channel: AttemptChannel) -> messages.PrefillDone:
        message = await self._receive(channel)
        if not isinstance(message, messages.PrefillDone):
            raise ProfilingError(f"worker {self.worker.id}: sent {type(message).__name__} where a first token was due")
        return message

    async def _receive(self, channel: AttemptChannel) -> messages.FromWorker:
        try:
            message = await channel.receive()
        except messages.WorkerLost as lost:
            raise ProfilingError(f"{lost}; can {self.worker.address} be reached from here, with this secret?") from lost
        if isinstance(message, messages.Failed):
            raise ProfilingError(f"worker {self.worker.id}: {message.code}: {message.message}")
        return message

    def _sequence(
        self, token_ids: Sequence[int], max_tokens: int, seed: int = 0, ref: Ref | None = None
    ) -> TokenSequence:
        """A prompt, or with the `ref` of one its continuation by one token."""
        return TokenSequence(
            ref=ref or Ref(f"profile-{self._run_id}-{self.worker.id}-{next(self._count)}"),
            token_ids=tuple(token_ids),
            prompt_len=len(token_ids) - (ref is not None),
            block_keys=tuple(chain(self.card.root, token_ids, self.card.block_tokens)),
            sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
            seed=seed,
        )


class _StepWatch:
    """When each of a batch's sequences got its tokens."""

    def __init__(self, prompt_tokens: int, batch: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._times_s: list[list[float]] = [[] for _ in range(batch)]
        self._all_since_s: float | None = None
        self._steps = 0
        self._enough = asyncio.Event()

    def note(self, index: int, now_s: float) -> None:
        """The sequence of this index got a token."""
        self._times_s[index].append(now_s)
        if self._all_since_s is None:
            if all(self._times_s):
                self._all_since_s = now_s
        elif index == 0:
            self._steps += 1
            if self._steps > _STEPS:
                self._enough.set()

    async def seen_enough(self) -> None:
        await self._enough.wait()

    def sample(self) -> StepSample:
        """Of the steps in which all sequences took part."""
        assert self._all_since_s is not None
        together = [at for at in self._times_s[0] if at >= self._all_since_s]
        outputs = sum(map(len, self._times_s)) - len(self._times_s) * len(together) // 2
        return StepSample(
            batch=len(self._times_s),
            context_tokens=len(self._times_s) * self._prompt_tokens + outputs,
            seconds=median(later - earlier for earlier, later in pairwise(together)),
        )
