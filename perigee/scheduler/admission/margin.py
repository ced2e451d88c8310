"""How much room to leave for what forecasts do not know."""

# Of the requests that begin to decode, so many may find that a promise of TBT does not hold at that moment.
_MISSES = 0.05
_RATE = 0.1
_MAX_DEVIATIONS = 4.0


class Margin:
    """So many standard deviations of its size a batch is taken to be larger than forecast. Learned from what comes of
    it: after a miss it grows, and after a hit it shrinks by less, so that in the long run as many miss as may.

    The forecast's own deviation is that of the lengths of answers. Queues that are shorter or longer than predicted,
    and prompts that arrive in between, add to that; how much they do is different for each cluster and load.
    """

    def __init__(self) -> None:
        self.deviations = 0.0

    def observe(self, missed: bool) -> None:
        """A request has begun to decode."""
        self.deviations = min(_MAX_DEVIATIONS, max(0.0, self.deviations + _RATE * (missed - _MISSES)))
