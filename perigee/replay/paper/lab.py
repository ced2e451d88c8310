"""Runs what the experiments ask for, each run once, as many at a time as there are processors."""

import gc
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

from perigee.kvstore.evict import LRU
from perigee.replay.cache_walk import Prompt, prompts_of, walk
from perigee.replay.metrics import Outcome, Report, Slo, summarize
from perigee.replay.paper.clusters import mooncake
from perigee.replay.paper.interrupts import end_silently, held
from perigee.replay.series import Sample
from perigee.replay.simulator.cluster import Cluster
from perigee.replay.simulator.machine import machine_of
from perigee.replay.simulator.simulation import Simulated, simulate
from perigee.replay.trace import BLOCK_TOKENS, read_trace, speed_up


@dataclass(frozen=True, slots=True)
class Trial:
    """A cluster, and how many times as fast as it was recorded the trace arrives."""

    cluster: Cluster
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a trial."""

    simulated: Simulated

    def report(self, ttft_s: float | None = None, tbt_s: float | None = None) -> Report:
        return summarize(self.simulated.records, Slo(ttft_s, tbt_s))

    def capacity(self, ttft_s: float, tbt_s: float) -> float:
        """Effective request capacity: the share of all requests that met both bounds (FAST '25, section 5.1)."""
        return self.report(ttft_s, tbt_s).goodput_ratio

    def prefill_s(self) -> float:
        """Time on a worker that the prompts of all completed requests took to compute, by the paper's testbed."""
        profile = machine_of(mooncake()).profile
        done = [each for each in self.simulated.records if each.outcome is Outcome.COMPLETED]
        return sum(profile.prefill_s(each.prompt_tokens - each.cached_tokens, each.cached_tokens) for each in done)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.simulated.samples


class Lab:
    """The results of trials on one trace, of which the first `limit` requests are used. Raises TraceError."""

    def __init__(self, trace: Path, limit: int | None = None) -> None:
        self.trace = trace
        self.limit = limit
        self._requests = read_trace(trace)[:limit]
        self._results: dict[Trial, Result] = {}

    def __getitem__(self, trial: Trial) -> Result:
        return self._results[trial]

    def hit_ratio(self, capacity_tokens: int | None) -> float:
        """Of the trace's blocks, under one LRU cache; None: with room for all of them."""
        num_slots = capacity_tokens // BLOCK_TOKENS if capacity_tokens else sum(map(len, self._prompts))
        return walk(self._prompts, num_slots, LRU()).hit_ratio

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return prompts_of(self._requests, BLOCK_TOKENS)

    def run(self, trials: Iterable[Trial], done: Callable[[], None]) -> None:
        """All that have not been run; `done` is called after each. Raises ReplayError or InvalidProfile."""
        waiting = [trial for trial in dict.fromkeys(trials) if trial not in self._results]
        # A process that has threads must not be forked; and a fresh one for each trial gives its memory back.
        context = get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), context, end_silently, max_tasks_per_child=1) as pool:
            with held():
                futures = {pool.submit(_run, trial, self.trace, self.limit): trial for trial in waiting}
            for future in as_completed(futures):
                self._results[futures[future]] = Result(future.result())
                done()


def _run(trial: Trial, trace: Path, limit: int | None) -> Simulated:
    gc.disable()  # references are counted, and the process ends with the trial
    return simulate(speed_up(read_trace(trace)[:limit], trial.speed), trial.cluster)
