"""When trying again may help."""

import math

import numpy as np

from perigee.scheduler.admission.base import MAX_RETRY_AFTER_S, Floats, decode_loads, within_bounds
from perigee.scheduler.ids import RequestKey
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import Demand, WorkerView

_STEP_S = 1.0
_FINE_STEP_S = 0.05
_MAX_PROMISES = 512


class Promises:
    """When those that were refused lately were told to come back. Each is a claim to the room that will be there then,
    so that the next is told to come later; otherwise all of them would come back at once. A claim counts against those
    of its own priority and below.
    """

    def __init__(self) -> None:
        self._due: dict[RequestKey, tuple[float, int]] = {}  # time and priority, oldest promise first

    def make(self, key: RequestKey, due_at: float, priority: int) -> None:
        self._due.pop(key, None)
        if len(self._due) == _MAX_PROMISES:
            del self._due[next(iter(self._due))]
        self._due[key] = due_at, priority

    def keep(self, key: RequestKey) -> None:
        """Whoever it was made to is here again."""
        self._due.pop(key, None)

    def before(self, times: Floats, priority: int, now: float) -> Floats:
        """How many claims there are by each of these times."""
        self._due = {key: promise for key, promise in self._due.items() if promise[0] > now}
        dues = sorted(due for due, other in self._due.values() if other >= priority)
        return np.searchsorted(np.array(dues), times, side="right").astype(np.float64)


def drained_s(
    view: ClusterView,
    worker: WorkerView,
    demand: Demand,
    tbt_s: float,
    now: float,
    limit: float = 1.0,
    promises: Promises | None = None,
    priority: int = 0,
) -> float:
    """Seconds until the forecast says that the request would be let in, within the bounds of Retry-After."""
    coarse = np.arange(_STEP_S, MAX_RETRY_AFTER_S + _STEP_S, _STEP_S)

    def first(offsets: Floats) -> float:
        load = view.forecast.load(worker, now + offsets, now)
        claims = promises.before(now + offsets, priority, now) if promises else np.zeros(len(offsets))
        more = 1.0 + claims / max(1, view.forecast.num_decoding)
        fits = decode_loads(worker, load, demand, tbt_s, more) <= limit
        return float(offsets[np.argmax(fits)]) if fits.any() else math.inf

    at = first(coarse)
    if at in (math.inf, _STEP_S):
        return within_bounds(at)
    return within_bounds(first(np.arange(at - _STEP_S, at + _FINE_STEP_S, _FINE_STEP_S)))
