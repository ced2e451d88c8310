"""How much work each pool has, in a unit that both share: the workers that it would fill."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from perigee.scheduler.ids import WorkerId
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import DecodeLoad, WorkerView

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
        self._ordered_s = 0.0

    def observe(self, view: ClusterView, pools: Pools, now: float) -> dict[str, Side]:
        """Looks at both pools now, and returns what they have been like lately."""
        elapsed_s = now - self._observed_at if self._observed_at is not None else 0.0
        busy = (view.ordered_prefill_s - self._ordered_s) / elapsed_s if elapsed_s > 0 else 0.0
        self._ordered_s = view.ordered_prefill_s
        observed = {"prefill": _prefill_work(view, pools.prefill, busy, now), "decode": _decode_work(view, pools)}
        kept = math.exp(-elapsed_s / self._smoothing_s)
        self._observed_at = now
        for role, work in observed.items():
            self._work[role] = kept * self._work[role] + (1.0 - kept) * work
        return {
            "prefill": Side(self._work["prefill"], len(pools.prefill_rows)),
            "decode": Side(self._work["decode"], len(pools.decode_rows)),
        }


def _prefill_work(view: ClusterView, workers: Sequence[WorkerView], busy: float, now: float) -> float:
    """As many workers as the prompts of the last second keep `busy`, and those that others keep busy; or more, if the
    last prompts will have waited for longer than the strictest bound on TTFT of those that wait with them.
    """
    wait_s = view.fleet.queue_s(math.inf, now)
    foreign = sum(worker.queue.foreign_s > 0 for worker in workers)
    return max(busy + foreign, sum(float(wait_s[worker.row]) / _patience_s(view, worker) for worker in workers))


def _patience_s(view: ClusterView, worker: WorkerView) -> float:
    strictest = min((view.requests[key].slo.ttft_s for key in worker.prefills), default=math.inf)
    return PATIENCE_S if math.isinf(strictest) else strictest


def _decode_work(view: ClusterView, pools: Pools) -> float:
    """What is booked for prompts that wait for others does not count: were there more prefill workers, it would be
    less.
    """
    waiting = _waiting(view, pools.prefill)
    return sum(
        decode_load(worker, worker.load.beyond(waiting[worker.id]), view.forecast.tightest_tbt_s(worker))
        for worker in pools.decode
    )


def _waiting(view: ClusterView, prefillers: Iterable[WorkerView]) -> Mapping[WorkerId, DecodeLoad]:
    """What the decode workers have booked for prompts that nobody computes yet."""
    waiting: defaultdict[WorkerId, DecodeLoad] = defaultdict(DecodeLoad)
    for worker in prefillers:
        for key, prompt in worker.prefills.items():
            if prompt is not worker.queue.first:
                request = view.requests[key]
                waiting[request.decode] += DecodeLoad(1, request.demand.pages, request.num_tokens)
    return waiting


def decode_load(worker: WorkerView, load: DecodeLoad, tbt_s: float) -> float:
    """The part of a decode worker that this load takes, as admission sees it: of places, of pages, or of the batch that
    keeps steps within `tbt_s`. A step of an empty batch takes its time, too, which is no load.
    """
    report = worker.report
    assert report is not None
    taken = max(_share(load.sequences, report.max_sequences), _share(load.pages, report.total_pages))
    if math.isinf(tbt_s):
        return taken
    empty_s = worker.cost.step_s(0, 0)
    step_s = worker.cost.step_s(load.sequences, load.context_tokens)
    return max(taken, (step_s - empty_s) / (tbt_s - empty_s) if tbt_s > empty_s else 1.0)


def _share(part: int, whole: int) -> float:
    """Of what there is nothing of, all is taken."""
    return part / whole if whole else 1.0
