"""Which worker a pool gives away: the one that has the least to finish before it can go."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from perigee.scheduler.ids import WorkerId
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import WorkerView

# When to look whether a decode worker will have come to its end, in seconds from now.
_MOMENTS_S = np.array([0.0, *np.geomspace(0.5, 512.0, 21)])
_NEVER_S = 1024.0

# A forecast takes the longer, the more sequences there are: so it is made only for those with the fewest.
_MOST_FORECASTS = 8


def choose_donor(
    view: ClusterView, pools: Pools, role: str, spared: Collection[WorkerId], now: float
) -> tuple[WorkerView, float] | None:
    """The worker of the pool `role` that will be done first, and in how many seconds; None if all are `spared`."""
    pool = pools.prefill if role == "prefill" else pools.decode
    workers = [worker for worker in pool if worker.id not in spared]
    if not workers:
        return None
    drains_s = _queues_s(view, workers, now) if role == "prefill" else _drains_s(view, workers, now)
    drain_s, index = min((drain_s, index) for index, drain_s in enumerate(drains_s))
    return workers[index], drain_s


def _queues_s(view: ClusterView, workers: Sequence[WorkerView], now: float) -> list[float]:
    wait_s = view.fleet.queue_s(math.inf, now)
    return [float(wait_s[worker.row]) for worker in workers]


def _drains_s(view: ClusterView, workers: Sequence[WorkerView], now: float) -> list[float]:
    few = sorted(range(len(workers)), key=lambda index: workers[index].load.sequences)[:_MOST_FORECASTS]
    return [_drain_s(view, worker, now) if index in few else _NEVER_S for index, worker in enumerate(workers)]


def _drain_s(view: ClusterView, worker: WorkerView, now: float) -> float:
    """When less than half a sequence is expected to be left, from the learned lengths of answers."""
    left = view.forecast.load(worker, now + _MOMENTS_S, now).places
    done = np.flatnonzero(left < 0.5)
    return float(_MOMENTS_S[done[0]]) if done.size else _NEVER_S
