"""Virtual time: what is to happen, in order."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Clock:
    """Runs actions at their times, those of one time in the order in which they were planned. `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._tickets = itertools.count()
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plans an action. What is planned for the past happens now."""
        if time_s < self.now:
            time_s = self.now
        heapq.heappush(self._heap, (time_s, next(self._tickets), action, arguments))

    def run(self) -> None:
        """Until nothing more is to happen."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now, _, action, arguments = pop(heap)
            action(*arguments)
