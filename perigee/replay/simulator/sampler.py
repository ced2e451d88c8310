"""Samples of a simulated cluster, one a second."""

from collections import Counter

from perigee.replay.metrics import Outcome, RequestRecord, Slo
from perigee.replay.series import Sample
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.control import Control
from perigee.replay.simulator.front import FrontEnd
from perigee.workers.engine.batcher import Batcher

PERIOD_S = 1.0


class Sampler:
    """`good` are the completed requests that meet `slo`."""

    def __init__(self, clock: Clock, control: Control, front: FrontEnd, slo: Slo) -> None:
        self.samples: list[Sample] = []
        self._clock = clock
        self._control = control
        self._front = front
        self._slo = slo
        self._outcomes: Counter[Outcome] = Counter()
        self._good = 0
        self._is_over = False

    def open(self) -> None:
        self._sample()

    def close(self) -> None:
        self._is_over = True

    def count(self, record: RequestRecord) -> None:
        """One more request has ended."""
        self._outcomes[record.outcome] += 1
        self._good += self._slo.met_by(record)

    def _sample(self) -> None:
        if self._is_over:
            return
        prefillers = [worker for worker in self._control.workers.values() if worker.role != "decode"]
        decoders = [worker for worker in self._control.workers.values() if worker.role != "prefill"]
        self.samples.append(
            Sample(
                at_s=self._clock.now,
                in_flight=len(self._front.flights),
                completed=self._outcomes[Outcome.COMPLETED],
                good=self._good,
                rejected=self._outcomes[Outcome.REJECTED],
                failed=self._outcomes[Outcome.FAILED],
                queued_tokens=sum(worker.engine.batcher.queued_prefill_tokens for worker in prefillers),
                prefill_load_s=_mean([worker.engine.prefill_load_s for worker in prefillers]),
                decode_load=_mean([_load(worker.engine.batcher) for worker in decoders]),
                decoding=sum(_num_decoding(worker.engine.batcher) for worker in decoders),
            )
        )
        self._clock.at(self._clock.now + PERIOD_S, self._sample)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _load(batcher: Batcher) -> float:
    pages = 1 - batcher.pool.num_free / batcher.pool.num_pages
    return max(pages, len(batcher.active) / batcher.limits.max_sequences)


def _num_decoding(batcher: Batcher) -> int:
    return sum(active.is_ready and active.is_decoding for active in batcher.active.values())
