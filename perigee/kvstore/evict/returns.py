"""When blocks return, learned from the past: the hazard of a return by class and age, and what it makes a block worth.

A block ages with the blocks that are committed after its last use, counted in epochs of a fixed share of the arena, so
that idle hours cost nothing and no rate needs to be known. Ages fall into `NUM_AGES` brackets of growing width.
"""

from collections.abc import Sequence
from itertools import pairwise

AGE_STARTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256, 384, 512)
"""The first epoch of each bracket of ages."""
NUM_AGES = len(AGE_STARTS)
HORIZON = AGE_STARTS[-1]
"""Epochs after which a return is not worth waiting for; the last bracket is without end and without worth."""

_DECAY = 0.95
"""What is left of every count each time that the worth of blocks is computed anew."""
_PRIOR_BLOCKS = 20.0
"""Blocks whose weight the prior has in the hazard of a bracket."""
_PRIOR_HAZARD = 0.02
"""Prior chance to return in a bracket, times its width over its end: falling with age, which is LRU's belief."""


class ReturnTimes:
    """Of each class and bracket of ages, how many blocks `reached` it, and how many `returned` within it.

    Whoever sees blocks come and go counts into both lists, by `klass * NUM_AGES + age`.
    """

    def __init__(self, num_classes: int) -> None:
        self.reached = [0.0] * (num_classes * NUM_AGES)
        self.returned = [0.0] * (num_classes * NUM_AGES)

    def densities(self) -> list[list[float]]:
        """The hit density of each class and age."""
        returned, reached = _by_class(self.returned), _by_class(self.reached)
        prior = self._hazards(_column_sums(returned), _column_sums(reached), _PRIOR)
        counts = zip(returned, reached, strict=True)
        return [hit_densities(self._hazards(hits, blocks, prior)) for hits, blocks in counts]

    def fade(self) -> None:
        """Lets the past count for less."""
        for counts in (self.reached, self.returned):
            counts[:] = [_DECAY * count for count in counts]

    @staticmethod
    def _hazards(returned: Sequence[float], reached: Sequence[float], prior: Sequence[float]) -> list[float]:
        """The chance to return in each bracket, for a block that reached it."""
        counts = zip(returned, reached, prior, strict=False)
        return [
            min(1.0, (hits + _PRIOR_BLOCKS * p) / (max(blocks, hits) + _PRIOR_BLOCKS)) for hits, blocks, p in counts
        ]


def hit_densities(hazards: Sequence[float]) -> list[float]:
    """What keeping a block of each age is worth, in hits per epoch, if it is given up at the best time to stop.

    This is Gittins' index: the largest ratio, over all ages to stop at, of the chance that the block returns until
    then to the time that it is expected to stay. In a bracket a return comes halfway on average. Hit density with the
    age at which a block happens to be evicted is due to Beckmann et al. (LHD, NSDI '18).

    Computed from the last age on: each stretch of ages is joined by the next one while that is worth more than it.
    """
    densities = [0.0]
    stretches: list[tuple[float, float, float]] = []  # hits, epochs, and the share that is left at the end
    for hazard, width in zip(reversed(hazards), reversed(_WIDTHS), strict=True):
        hits, epochs, left = hazard, width * (1 - hazard / 2), 1 - hazard
        while stretches and stretches[-1][0] * epochs > hits * stretches[-1][1]:
            more_hits, more_epochs, still_left = stretches.pop()
            hits, epochs, left = hits + left * more_hits, epochs + left * more_epochs, left * still_left
        stretches.append((hits, epochs, left))
        densities.append(hits / epochs)
    return densities[::-1]


def _by_class(counts: Sequence[float]) -> list[Sequence[float]]:
    return [counts[first : first + NUM_AGES] for first in range(0, len(counts), NUM_AGES)]


def _column_sums(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


_WIDTHS = tuple(end - start for start, end in pairwise(AGE_STARTS))
_PRIOR = tuple(_PRIOR_HAZARD * (end - start) / end for start, end in pairwise(AGE_STARTS))
