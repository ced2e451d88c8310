"""How much work each pool has, in a unit that both share: the workers that it would fill."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import WorkerView

# How long a prompt may wait where nobody was promised a time to first token.
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Side:
    """A pool's work at one moment or smoothed, in workers that it would fill, and how many workers there are."""

    work: float
    workers: int

    @property
    def load(self) -> float:
        """1: full."""
        return self.load_on(self.workers)

    def load_on(self, workers: int) -> float:
        """The load of so many workers with this pool's work."""
        return self.work / workers if workers > 0 else math.inf


class Pressure:
    """Work of both pools, smoothed over about `smoothing_s`: a burst that passes in less hardly shows."""

    def __init__(self, smoothing_s: float) -> None:
        self._smoothing_s = smoothing_s
        self._work = {"prefill": 0.0, "decode": 0.0}
        self._observed_at: float | None = None

    def observe(self, view: ClusterView, pools: Pools, now: float) -> dict[str, Side]:
        """Looks at both pools now, and returns what they have been like lately."""
        observed = {"prefill": _prefill_work(view, pools.prefill, now), "decode": _decode_work(view, pools.decode)}
        elapsed_s = now - self._observed_at if self._observed_at is not None else 0.0
        kept = math.exp(-elapsed_s / self._smoothing_s)
        self._observed_at = now
        for role, work in observed.items():
            self._work[role] = kept * self._work[role] + (1.0 - kept) * work
        return {
            "prefill": Side(self._work["prefill"], len(pools.prefill_rows)),
            "decode": Side(self._work["decode"], len(pools.decode_rows)),
        }


def _prefill_work(view: ClusterView, workers: Sequence[WorkerView], now: float) -> float:
    """A worker that computes is full. One whose last prompt will have waited for longer than the strictest bound on
    TTFT of those that wait there is as many times fuller.
    """
    wait_s = view.fleet.queue_s(math.inf, now)
    return sum(
        max(float(_is_busy(worker)), float(wait_s[worker.row]) / _patience_s(view, worker)) for worker in workers
    )


def _is_busy(worker: WorkerView) -> bool:
    return bool(worker.prefills) or (worker.report is not None and worker.report.queued_prefill_tokens > 0)


def _patience_s(view: ClusterView, worker: WorkerView) -> float:
    strictest = min((view.requests[key].slo.ttft_s for key in worker.prefills), default=math.inf)
    return PATIENCE_S if math.isinf(strictest) else strictest


def _decode_work(view: ClusterView, workers: Sequence[WorkerView]) -> float:
    return sum(decode_load(worker, view.forecast.tightest_tbt_s(worker)) for worker in workers)


def decode_load(worker: WorkerView, tbt_s: float) -> float:
    """The part of a decode worker that is taken, as admission sees it: of places, of pages, or of the batch that keeps
    steps within `tbt_s`. A step of an empty batch takes its time, too, which is no load.
    """
    report, load = worker.report, worker.load
    assert report is not None
    taken = max(load.sequences / report.max_sequences, load.pages / report.total_pages)
    if math.isinf(tbt_s):
        return taken
    empty_s = worker.cost.step_s(0, 0)
    step_s = worker.cost.step_s(load.sequences, load.context_tokens)
    return max(taken, (step_s - empty_s) / (tbt_s - empty_s) if tbt_s > empty_s else 1.0)
