"""When trying again may help."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.admission.base import (
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    Floats,
    decode_loads,
    within_bounds,
)
from perigee.scheduler.ids import RequestKey
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import Demand, WorkerView

# First it is looked at these times, and then at so many between the two that matter.
_COARSE: Floats = np.geomspace(MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S, 12)
_NUM_FINE = 9

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


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request would be let in by: a load of at most `limit` on this decode worker, `lead_s` after it arrives,
    with `margin` sequences of its size to spare. It adds `more` sequences to what is booked there: none if it is.
    """

    worker: WorkerView
    demand: Demand
    tbt_s: float
    lead_s: float = 0.0
    limit: float = 1.0
    margin: float = 0.0
    priority: int = 0
    more: float = 1.0


def drained_s(view: ClusterView, wish: Wish, now: float, promises: Promises | None = None) -> float:
    """Seconds until the forecast says that the request would be let in, within the bounds of Retry-After."""
    offsets = _COARSE
    for _ in range(2):
        fits = _fits(view, wish, offsets, now, promises)
        if not fits.any():
            return MAX_RETRY_AFTER_S
        first = int(np.argmax(fits))
        if not first:
            break
        offsets = np.linspace(offsets[first - 1], offsets[first], _NUM_FINE)
    return within_bounds(float(offsets[first]))


def _fits(view: ClusterView, wish: Wish, offsets: Floats, now: float, promises: Promises | None) -> NDArray[np.bool_]:
    """Whether it would be let in, if it came so many seconds from now."""
    load = view.forecast.load(wish.worker, now + wish.lead_s + offsets, now)
    claims = promises.before(now + offsets, wish.priority, now) if promises else np.zeros(len(offsets))
    more = wish.more + claims / max(1, view.forecast.num_decoding)
    return decode_loads(wish.worker, load, wish.demand, wish.tbt_s, more, wish.margin) <= wish.limit
