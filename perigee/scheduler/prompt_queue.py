"""The prompts that were sent to a prefill worker and have not come to their first token, in predicted seconds.

A worker computes the prompt of the smallest rank first, so a new one waits for those of its rank and smaller ones, less
what is done of the first by now.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.cost import WorkerCost
from perigee.scheduler.ids import RequestKey

_NEVER = -np.inf

# A worker hears of a placement through a server and reports it then: what is younger may not be in its report yet.
REPORT_LAG_S = 0.5


@dataclass(slots=True)
class PlacedPrefill:
    """One prompt: tokens to compute after those of the prefix, and what that was predicted to take, with getting the
    prefix. Its queue fills `left_s`, which was true when the queue was last brought up to date.
    """

    new_tokens: int
    prefix_tokens: int
    work_s: float
    rank: float
    placed_at: float
    left_s: float = 0.0


class RankedWork:
    """The prompts of all workers in one table, so that one operation tells how long a prompt would wait on each."""

    def __init__(self) -> None:
        self._keys: list[RequestKey] = []
        self._index: dict[RequestKey, int] = {}
        self._rows = np.zeros(16, np.intp)
        self._table = np.zeros((3, 16))  # ranks, seconds of those that wait, and when those end that are first

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, key: RequestKey, row: int, rank: float, seconds: float = 0.0, ends_at: float = _NEVER) -> None:
        """Enters a prompt of the worker in `row` of the fleet, or changes what is to be counted for it: `seconds`, or
        those until it `ends_at`.
        """
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self._keys)
            self._keys.append(key)
            if index == len(self._rows):
                self._grow()
        self._rows[index] = row
        self._table[:, index] = rank, seconds, ends_at

    def remove(self, key: RequestKey) -> None:
        """The last prompt of the table takes its place."""
        index, last = self._index.pop(key), len(self._keys) - 1
        moved = self._keys.pop()
        if index != last:
            self._keys[index] = moved
            self._index[moved] = index
            self._rows[index] = self._rows[last]
            self._table[:, index] = self._table[:, last]

    def until(self, rank: float, num_rows: int, now: float) -> NDArray[np.float64]:
        """The seconds of work of this rank and smaller ones, by row."""
        size = len(self._keys)
        ranks, seconds, ends_at = self._table[:, :size]
        left_s = ends_at - now
        np.maximum(left_s, seconds, out=left_s)
        left_s *= ranks <= rank
        return np.asarray(np.bincount(self._rows[:size], weights=left_s, minlength=num_rows), np.float64)

    def _grow(self) -> None:
        self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)


class PromptQueue:
    """The prompts of one worker. Time passes for the `first` alone: it has `first.left_s` to go from `settled_at` on.

    `foreign_s` is for what the worker reports beyond what we sent it: another Conductor's doing.
    """

    def __init__(self, work: RankedWork, row: int) -> None:
        self.prompts: dict[RequestKey, PlacedPrefill] = {}
        self.first: PlacedPrefill | None = None
        self.settled_at = 0.0
        self.foreign_s = 0.0
        self._first_key: RequestKey | None = None
        self._work = work
        self._row = row

    @property
    def first_ends_at(self) -> float:
        """When the first prompt is predicted to have come to its token; 0 if there is none."""
        return self.settled_at + self.first.left_s if self.first is not None else 0.0

    def add(self, key: RequestKey, prompt: PlacedPrefill, now: float) -> None:
        """A prompt was sent to the worker."""
        prompt.left_s = prompt.work_s
        self.prompts[key] = prompt
        if self.first is None or prompt.rank < self.first.rank:
            self._put_back(now)
            self._begin(key, now)
        else:
            self._work.put(key, self._row, prompt.rank, prompt.left_s)

    def remove(self, key: RequestKey, now: float) -> None:
        """It came to its token, or is not wanted any more. Does nothing if it is not there."""
        if self.prompts.pop(key, None) is None:
            return
        self._work.remove(key)
        if key == self._first_key:
            self.first = self._first_key = None
            if self.prompts:
                self._begin(min(self.prompts, key=self._rank_of), now)

    def take_report(self, queued_tokens: int, cost: WorkerCost, now: float) -> None:
        """The worker says how many prompt tokens it still has to compute, those included that it may yet find cached.

        That tells how far the first is if it is alone, and that there is more than what we sent.
        """
        known_tokens = sum(prompt.new_tokens + prompt.prefix_tokens for prompt in self.prompts.values())
        foreign_tokens = max(0, queued_tokens - known_tokens)
        self.foreign_s = cost.prefill_s(foreign_tokens, 0) if foreign_tokens else 0.0
        first = self.first
        if first is not None and len(self.prompts) == 1 and first.placed_at < now - REPORT_LAG_S:
            left = min(queued_tokens, first.new_tokens)
            done = first.new_tokens + first.prefix_tokens - left
            first.left_s = min(first.work_s, cost.prefill_s(left, done)) if left else 0.0
            self.settled_at = now
            self._put_first()

    def _begin(self, key: RequestKey, now: float) -> None:
        """From now on time passes for this prompt."""
        self._first_key, self.first, self.settled_at = key, self.prompts[key], now
        self._put_first()

    def _put_first(self) -> None:
        if self.first is not None and self._first_key is not None:
            self._work.put(self._first_key, self._row, self.first.rank, ends_at=self.first_ends_at)

    def _put_back(self, now: float) -> None:
        """The first prompt, if there is one, waits again, for another goes before it."""
        if self.first is not None and self._first_key is not None:
            self.first.left_s = max(0.0, self.first_ends_at - max(now, self.settled_at))
            self._work.put(self._first_key, self._row, self.first.rank, self.first.left_s)

    def _rank_of(self, key: RequestKey) -> float:
        return self.prompts[key].rank
