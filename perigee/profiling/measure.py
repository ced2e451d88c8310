"""Measures workers, one after the other: prefill and loading, pulling from other nodes, decoding."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from perigee.profiling.design import Sizes
from perigee.profiling.errors import ProfilingError
from perigee.profiling.probe import Probe
from perigee.scheduler.cost.fit import MoveSample, PrefillSample, Samples, StepSample
from perigee.workers.messages import PrefillDone

logger = logging.getLogger(__name__)

Point = TypeVar("Point")

# What keeps a neighbour busy: prompts of so many tokens.
_NEIGHBOUR_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: `repeats` of each size, and no more of them `seconds` after a phase began."""

    max_tokens: int
    repeats: int
    seconds: float


@dataclass(slots=True)
class Bench:
    """Fills lists of samples. Prompts are drawn from `random`, so that no cache holds them unless they were asked for
    before."""

    effort: Effort
    random: np.random.Generator
    prefills: list[PrefillSample] = field(default_factory=list)
    loads: list[MoveSample] = field(default_factory=list)
    pulls: list[MoveSample] = field(default_factory=list)
    steps: list[StepSample] = field(default_factory=list)

    @property
    def samples(self) -> Samples:
        return Samples(self.prefills, self.loads, self.pulls, self.steps)

    async def measure_prefill(self, probe: Probe) -> None:
        """Prompts of all sizes on one worker, those with a prefix after that was computed once."""
        sizes = self._sizes(probe)
        await probe.prefill(self._tokens(probe, sizes.lengths()[0]))  # what starts up in a first step does not count
        prefixes: dict[int, list[int]] = {0: []}
        for new, prefix in self._while_time(sizes.prefills()):
            if prefix not in prefixes:
                prefixes[prefix] = self._tokens(probe, prefix)
                await probe.prefill(prefixes[prefix])
            done = await probe.prefill(prefixes[prefix] + self._tokens(probe, new))
            self._note_prefill(done, new + prefix)

    async def measure_pull(self, probe: Probe, source: Probe) -> None:
        """Prefixes that another worker computed, at another store node; once more when they are here."""
        for length in self._while_time(self._sizes(probe).lengths()):
            prefix = self._tokens(source, length)
            await source.prefill(prefix)
            pulled = await probe.prefill(prefix + self._tokens(probe, 1), source.worker.store)
            loaded = await probe.prefill(prefix + self._tokens(probe, 1))
            pull_s = pulled.load_s - loaded.load_s
            if pulled.cached_tokens_remote and pull_s > 0:
                self.pulls.append(MoveSample(pulled.cached_tokens_remote, pull_s))

    async def measure_steps(self, probe: Probe, prefill: Probe) -> None:
        """Batches of all sizes on one worker, over prompts that `prefill` computed."""
        source = prefill.worker.store if prefill.worker.store != probe.worker.store else ""
        prompts: dict[int, tuple[list[int], int]] = {}
        for batch, length in self._while_time(self._sizes(probe).steps()):
            if length not in prompts:
                tokens = self._tokens(prefill, length)
                prompts[length] = tokens, (await prefill.prefill(tokens)).token.token
            tokens, first = prompts[length]
            sample = await probe.steps(tokens, first, batch, source)
            logger.debug("step measured worker=%s %s", probe.worker.id, sample)
            self.steps.append(sample)

    @asynccontextmanager
    async def occupied(self, neighbours: Sequence[Probe]) -> AsyncIterator[None]:
        """Keeps these workers computing prompts until the context is left. Raises ProfilingError if one fails."""
        try:
            async with asyncio.TaskGroup() as tasks:
                busy = [tasks.create_task(self._occupy(probe)) for probe in neighbours]
                yield
                for task in busy:
                    task.cancel()
        except* ProfilingError as errors:
            raise errors.exceptions[0] from errors

    async def _occupy(self, probe: Probe) -> None:
        while True:
            await probe.prefill(self._tokens(probe, _NEIGHBOUR_TOKENS))

    def _note_prefill(self, done: PrefillDone, num_tokens: int) -> None:
        cached = done.cached_tokens_dram + done.cached_tokens_ssd + done.cached_tokens_remote
        sample = PrefillSample(num_tokens - cached, cached, done.compute_s)
        logger.debug("prefill measured %s load_s=%.6f", sample, done.load_s)
        self.prefills.append(sample)
        self.loads.append(MoveSample(cached, done.load_s))

    def _while_time(self, points: Sequence[Point]) -> Iterator[Point]:
        """All points, as often as is asked for, but after the first round only while there is time."""
        until_s = time.monotonic() + self.effort.seconds
        for turn in range(self.effort.repeats):
            for point in points:
                if turn and time.monotonic() > until_s:
                    return
                yield point

    def _sizes(self, probe: Probe) -> Sizes:
        return Sizes.of(probe.worker, probe.card, self.effort.max_tokens)

    def _tokens(self, probe: Probe, length: int) -> list[int]:
        """Token ids from the middle of the vocabulary, where no special ones are."""
        margin = probe.card.vocab_size // 8
        drawn = self.random.integers(margin, probe.card.vocab_size - margin, length)
        return [int(token) for token in drawn]
