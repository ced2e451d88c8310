"""What the workers will have on their hands later on, from the requests in flight and the learned lengths of answers.

A worker's forecast is made when somebody asks for it, from the requests on that worker alone: so it costs the more, the
larger a batch is, and the same however many workers there are.
"""

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.ids import RequestKey, WorkerId
from perigee.scheduler.lengths import LengthModel
from perigee.scheduler.outlook import Coming, Load, Outlook
from perigee.scheduler.worker_view import DecodeLoad, WorkerView

Floats = NDArray[np.float64]


class Forecast:
    """Kept by the ClusterView, which tells it what happens to requests; policies ask it."""

    def __init__(self, lengths: LengthModel) -> None:
        self._lengths = lengths
        self._outlooks: dict[WorkerId, Outlook] = {}  # of decode workers that have requests
        self._prompts: set[RequestKey] = set()  # that are not computed yet

    # ---- what happens

    def place(self, key: RequestKey, decode: WorkerView, coming: Coming, now: float) -> None:
        """A request was sent to a decode worker."""
        outlook = self._outlooks.get(decode.id)
        if outlook is None:
            outlook = self._outlooks[decode.id] = Outlook(decode.cost, now)
        outlook.add(key, coming)
        self._prompts.add(key)

    def prefilled(self, key: RequestKey, decode: WorkerId, now: float) -> None:
        self._prompts.discard(key)
        if outlook := self._outlooks.get(decode):
            outlook.start(key, now)

    def joined(self, key: RequestKey, decode: WorkerId, now: float) -> None:
        if outlook := self._outlooks.get(decode):
            outlook.join(key, now)

    def drop(self, key: RequestKey, decode: WorkerId) -> None:
        """A request is off the books, whatever became of it."""
        self._prompts.discard(key)
        if outlook := self._outlooks.get(decode):
            outlook.remove(key)
            if not len(outlook):
                del self._outlooks[decode]

    def reported(self, worker: WorkerId, steps_total: int, now: float) -> None:
        """A decode worker says how many steps it has made."""
        if outlook := self._outlooks.get(worker):
            outlook.reported(steps_total, now)

    # ---- what is expected

    @property
    def num_prefilling(self) -> int:
        """Prompts that are not computed yet."""
        return len(self._prompts)

    @property
    def num_decoding(self) -> int:
        """Decode workers that have requests."""
        return len(self._outlooks)

    def load(self, worker: WorkerView, times: Floats, now: float) -> Load:
        """A decode worker's load at these moments from `now` on, with what others placed on it, which stays."""
        outlook = self._outlooks.get(worker.id)
        load = outlook.at(times, self._lengths, now) if outlook else _nothing(len(times))
        return _beside(worker, load)

    def most(self, worker: WorkerView) -> DecodeLoad:
        """What `load` exceeds at no time, unless more is sent to the worker: known at once, however many there are."""
        outlook = self._outlooks.get(worker.id)
        most = outlook.most if outlook else DecodeLoad()
        return most + worker.foreign if worker.foreign.sequences else most

    def load_after(self, worker: WorkerView, times: Floats, decode_s: float) -> Load:
        """The same, did every sequence decode for `decode_s`, and hold nothing before."""
        outlook = self._outlooks.get(worker.id)
        return _beside(worker, outlook.after(times, decode_s) if outlook else _nothing(len(times)))

    def tightest_tbt_s(self, worker: WorkerView) -> float:
        """The strictest bound on TBT of the requests on a decode worker; infinity if there is none."""
        outlook = self._outlooks.get(worker.id)
        return outlook.tightest_tbt_s if outlook else np.inf

    def stricter(self, tbt_s: float) -> set[WorkerId]:
        """The decode workers with a request that was promised a TBT below this."""
        return {worker for worker, outlook in self._outlooks.items() if outlook.tightest_tbt_s < tbt_s}

    def last_start(self, worker: WorkerView) -> float:
        """When the last of the requests on a decode worker is predicted to join; minus infinity if there is none."""
        outlook = self._outlooks.get(worker.id)
        return outlook.last_start if outlook else -np.inf

    def broken_work_s(self, worker: WorkerView, step_s: float) -> float:
        """The prefill work of those requests on a decode worker whose bound on TBT such steps do not keep."""
        outlook = self._outlooks.get(worker.id)
        return outlook.broken_work_s(step_s) if outlook else 0.0


def _nothing(count: int) -> Load:
    zero = np.zeros(count)
    return Load(zero, zero, zero, zero)


def _beside(worker: WorkerView, load: Load) -> Load:
    """With what others than this Conductor placed on the worker."""
    foreign = worker.foreign
    if not foreign.sequences:
        return load  # what looks like foreign context is the growth of our own
    return Load(
        batch=load.batch + foreign.sequences,
        context_tokens=load.context_tokens + foreign.context_tokens,
        places=load.places + foreign.sequences,
        pages=load.pages + foreign.pages,
    )
