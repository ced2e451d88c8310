"""How much room to leave for what forecasts do not know."""

# Of the requests that begin to decode, so many may find that a promise of TBT does not hold at that moment.
_MISSES = 0.05
_RATE = 0.2  # in sequences
_MAX_SEQUENCES = 8.0


class Margin:
    """By so many sequences a batch is taken to be larger than forecast. Learned from what comes of it: after a miss it
    grows, and after a hit it shrinks by less, so that in the long run as many miss as may.

    Answers are longer or shorter than expected, queues faster or slower, and prompts arrive in between: how much all of
    that comes to is different for each cluster and load.
    """

    def __init__(self) -> None:
        self.sequences = 0.0

    def observe(self, missed: bool) -> None:
        """A request has begun to decode."""
        self.sequences = min(_MAX_SEQUENCES, max(0.0, self.sequences + _RATE * (missed - _MISSES)))
