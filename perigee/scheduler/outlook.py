"""What is on one decode worker, and what will be there later."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.cost import WorkerCost
from perigee.scheduler.ids import RequestKey
from perigee.scheduler.lengths import LengthModel, Odds
from perigee.scheduler.worker_view import DecodeLoad

Floats = NDArray[np.float64]

# Rows of the table: one column for each request.
_STARTS, _JOINED, _BORN, _GROUP, _LIMIT, _REACHES, _BEYOND, _CONTEXT, _PAGES, _TBT, _WORK = range(11)
_NUM_FIELDS = 11

_TINY = 1e-300


class Coming(NamedTuple):
    """A request that will decode on a worker: from when on, in seconds of the Conductor's clock, how long it is
    expected to be, the tokens and pages that it takes, its bound on TBT, and the work that its prompt costs.
    """

    starts_at: float
    odds: Odds
    context_tokens: int
    pages: int
    tbt_s: float
    work_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """A decode worker's load at some moments: arrays of one number each, expected values.

    A sequence holds its place and pages from its dispatch on, and adds to the batch from its first token on.
    """

    batch: Floats
    context_tokens: Floats
    places: Floats
    pages: Floats


class Outlook:
    """One decode worker's requests. The Forecast alone changes it; to ask changes nothing.

    A sequence's age in tokens is read off a clock that counts the worker's decode steps, as predicted.
    """

    def __init__(self, cost: WorkerCost, now: float) -> None:
        self._cost = cost
        self._keys: list[RequestKey] = []  # of the columns
        self._columns: dict[RequestKey, int] = {}
        self._table = np.zeros((_NUM_FIELDS, 8))
        self._steps = 0.0  # at `_stepped_at`
        self._stepped_at = now
        self._batch = 0  # sequences that have joined
        self._context = 0.0  # what they hold, less the steps at which they joined
        self._reported = (0, 0.0)  # steps by the worker's own count, and by ours then
        # Of all that are here: the pages, and the tokens that they may come to at the most; and the strictest bound on
        # TBT, None where that has to be looked up.
        self._pages = 0
        self._most_tokens = 0
        self._tightest: float | None = np.inf

    def __len__(self) -> int:
        return len(self._columns)

    # ---- what happens

    def add(self, key: RequestKey, coming: Coming) -> None:
        count = len(self._columns)
        if count == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        group, limit, reaches, beyond = coming.odds
        born = 0.0  # not yet
        self._table[:, count] = (
            coming.starts_at, 0.0, born, group, limit, reaches, beyond,
            coming.context_tokens, coming.pages, coming.tbt_s, coming.work_s,
        )  # fmt: skip
        self._columns[key] = count
        self._keys.append(key)
        self._pages += coming.pages
        self._most_tokens += coming.context_tokens + int(limit)
        if self._tightest is not None:
            self._tightest = min(self._tightest, coming.tbt_s)

    def start(self, key: RequestKey, now: float) -> None:
        """Its prompt is computed."""
        if (column := self._columns.get(key)) is not None:
            self._table[_STARTS, column] = now

    def join(self, key: RequestKey, now: float) -> None:
        """It decodes."""
        column = self._columns.get(key)
        if column is None or self._table[_JOINED, column]:
            return
        self._pass_time(now)
        self._table[(_STARTS, _JOINED, _BORN), column] = now, 1.0, self._steps
        self._batch += 1
        self._context += self._table.item(_CONTEXT, column) - self._steps

    def remove(self, key: RequestKey) -> None:
        """Nothing is left of it, wherever it stood. The last column takes its place."""
        column = self._columns.pop(key, None)
        if column is None:
            return
        table = self._table
        _, joined, born, _, limit, _, _, context, pages, tbt_s, _ = table[:, column].tolist()
        if joined:
            self._batch -= 1
            self._context -= context - born
        self._pages -= int(pages)
        self._most_tokens -= int(context + limit)
        if tbt_s == self._tightest:
            self._tightest = None
        last = self._keys.pop()
        if last != key:
            table[:, column] = table[:, len(self._keys)]
            self._keys[column] = last
            self._columns[last] = column

    def reported(self, steps_total: int, now: float) -> None:
        """The worker says how many steps it has made: the clock then shows that, for as long as it is one to go by."""
        self._pass_time(now)
        steps_before, ours_before = self._reported
        if 0 < steps_before < steps_total:
            self._steps = ours_before + steps_total - steps_before
        self._reported = steps_total, self._steps

    # ---- what is expected

    @property
    def tightest_tbt_s(self) -> float:
        """The strictest bound of all requests here; infinity if there is none."""
        if self._tightest is None:
            self._tightest = float(self._table[_TBT, : len(self)].min(initial=np.inf))
        return self._tightest

    @property
    def last_start(self) -> float:
        """When the last one is predicted to join; minus infinity if there is none."""
        return float(self._table[_STARTS, : len(self)].max(initial=-np.inf))

    @property
    def most(self) -> DecodeLoad:
        """What `at` exceeds at no time: all that is here, as long as it may get."""
        return DecodeLoad(len(self), self._pages, self._most_tokens)

    def at(self, times: Floats, lengths: LengthModel, now: float) -> Load:
        """The load at these moments, none of which is before `now`."""
        table = self._table[:, : len(self)]
        when = times[:, None]
        age, later = self._ages(table, when, now)
        alive = _still_there(table, lengths, age, later)
        decoding = alive * (table[_STARTS] <= when)
        return Load(
            batch=decoding.sum(axis=1),
            context_tokens=(decoding * (table[_CONTEXT] + later)).sum(axis=1),
            places=alive.sum(axis=1),
            pages=alive @ table[_PAGES],
        )

    def after(self, times: Floats, decode_s: float) -> Load:
        """The same, did every sequence decode for `decode_s`."""
        table = self._table[:, : len(self)]
        when = times[:, None]
        alive = (when < table[_STARTS] + decode_s).astype(np.float64)
        decoding = alive * (table[_STARTS] <= when)
        return Load(
            batch=decoding.sum(axis=1),
            context_tokens=(decoding * table[_CONTEXT]).sum(axis=1),
            places=decoding.sum(axis=1),
            pages=(decoding * table[_PAGES]).sum(axis=1),
        )

    def broken_work_s(self, step_s: float) -> float:
        """The work in those sequences whose bound on TBT such steps do not keep."""
        tbt, work = self._table[_TBT, : len(self)], self._table[_WORK, : len(self)]
        return float(work[tbt < step_s].sum())

    def _ages(self, table: Floats, when: Floats, now: float) -> tuple[Floats, Floats]:
        """Tokens generated by now, and at these times: [sequences] and [times, sequences].

        Steps are expected to take as long as now. (To count who is on the way would count them as there before they
        are, and those that leave meanwhile as still there.)
        """
        joined = table[_JOINED]
        step_s = self._step_s() if self._batch else self._cost.step_s(1, float(table[_CONTEXT].mean()))
        steps = self._steps + (now - self._stepped_at) / step_s
        age = joined * np.maximum(0.0, steps - table[_BORN])
        begins = np.maximum(now, table[_STARTS])  # what has joined began before
        return age, age + np.maximum(0.0, when - begins) / step_s

    def _step_s(self) -> float:
        batch = max(1, self._batch)
        return self._cost.step_s(batch, max(0.0, self._context + self._batch * self._steps))

    def _pass_time(self, now: float) -> None:
        if self._batch:
            self._steps += max(0.0, now - self._stepped_at) / self._step_s()
        self._stepped_at = now


def _still_there(table: Floats, lengths: LengthModel, age: Floats, later: Floats) -> Floats:
    """P(a sequence is longer than `later`, given that it is longer than `age`): [times, sequences]."""
    group = table[_GROUP].astype(np.intp)
    columns = table[_LIMIT], table[_REACHES], table[_BEYOND]
    longer = lengths.survivals(group, *columns, np.concatenate([age[None], later]))
    still_there: Floats = longer[1:] / np.maximum(longer[0], _TINY)  # of what is past its limit nothing is left later
    return still_there
