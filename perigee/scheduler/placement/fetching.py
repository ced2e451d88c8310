"""When a worker fetches the cached prefix that its own store node lacks: three answers to compare."""

from itertools import islice

from perigee.scheduler.placement.prefill import Prompt
from perigee.scheduler.plan import PrefillWay
from perigee.scheduler.prefixes import positions

# A worker's own prefix is good enough unless the best one anywhere is longer by this factor. The paper sets its
# threshold by hand, and does not say to what.
BALANCING_THRESHOLD = 1.5

# So many sources are considered, and of those that hold equally much so many are looked at.
_MAX_SOURCES = 3
_MAX_EQUALS = 8


class NoFetch:
    """Only what a worker's own store node holds counts."""

    def ways(self, prompt: Prompt, local_blocks: int) -> list[PrefillWay]:
        return [prompt.computing(local_blocks)]


class ThresholdFetch:
    """The paper's: from the node that holds most of the prompt, if that is more than the worker's own node holds by
    `threshold`, a factor.
    """

    def __init__(self, threshold: float = BALANCING_THRESHOLD) -> None:
        self._threshold = threshold

    def ways(self, prompt: Prompt, local_blocks: int) -> list[PrefillWay]:
        most = max(prompt.held.groups, default=0)
        if most <= local_blocks or most < self._threshold * local_blocks:
            return [prompt.computing(local_blocks)]
        return [prompt.fetching(local_blocks, next(positions(prompt.held.groups[most])), most, waits=False)]


class CheaperFetch:
    """Fetches exactly where that is predicted to be faster, from whichever holder makes it fastest.

    A holder that sends already, or would have to read its SSD, is passed over for one that holds less but is free. To
    fetch only a part of what a holder has never helps: the later a token, the more it takes to compute, and the same to
    move; so what is worth fetching in part is worth fetching whole.
    """

    def ways(self, prompt: Prompt, local_blocks: int) -> list[PrefillWay]:
        ways = [prompt.computing(local_blocks)]
        soonest_s = float("inf")
        for blocks, nodes in reversed(prompt.held.groups.items()):
            if blocks <= local_blocks or len(ways) > _MAX_SOURCES or not soonest_s:
                break
            delay_s, source = min((prompt.delay_s(number), number) for number in islice(positions(nodes), _MAX_EQUALS))
            if delay_s < soonest_s:
                soonest_s = delay_s
                ways.append(prompt.fetching(local_blocks, source, blocks))
        return ways
