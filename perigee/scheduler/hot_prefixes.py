"""Which prefixes are missed: asked for on a node that lacks them while another holds them.

What is counted is what a copy would have saved: the time to fetch the prefix, or to compute it again. A prefix is
counted at lengths of 1, 2, 4, 8 … blocks only. So a request costs a few operations however long it is, and the part
that many prompts share is found to within a factor of two of its length.
"""

import heapq
from dataclasses import dataclass
from itertools import compress

import numpy as np

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.model import Quantity
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import PrefillEstimate
from perigee.scheduler.prefixes import PrefixIndex

# What was missed counts half after so long.
HALF_LIFE_S = 60.0

# More than this many are not remembered: those go that count least.
_MOST = 1024


@dataclass(slots=True)
class HotPrefix:
    """A prefix, and the seconds that its absence cost lately, as of `at`."""

    keys: tuple[BlockKey, ...]
    lost_s: float
    at: float

    def lately_s(self, now: float) -> float:
        return self.lost_s * _kept(now - self.at)


class HotPrefixes:
    """Told of each dispatch."""

    def __init__(self, index: PrefixIndex, profile: CostProfile) -> None:
        self._index = index
        self._profile = profile
        self._hot: dict[BlockKey, HotPrefix] = {}  # by the last key

    def __len__(self) -> int:
        return len(self._hot)

    def note(self, request: RequestArrived, prefill: PrefillEstimate, block_tokens: int, now: float) -> None:
        """The request goes where its prompt is prefilled as estimated."""
        keys = request.block_keys
        here = -(-(prefill.prefix_tokens - prefill.remote_tokens) // block_tokens)
        count = 1 << here.bit_length()  # the first power of two beyond what is here
        while count <= len(keys) and keys[count - 1] in self._index:
            self._add(keys, count, self._lost_s(here * block_tokens, count * block_tokens, bool(prefill.source)), now)
            count *= 2

    def hottest(self, count: int, now: float) -> list[HotPrefix]:
        """Those that cost most lately, the first one most."""
        return heapq.nlargest(count, self._hot.values(), key=lambda hot: (hot.lately_s(now), hot.keys[-1]))

    def _lost_s(self, here: int, tokens: int, fetched: bool) -> float:
        """For want of the tokens after those that are here."""
        more = float(tokens - here)
        return self._profile.transfer_s(more) if fetched else self._profile.prefill_s(more, float(here))

    def _add(self, keys: tuple[BlockKey, ...], count: int, lost_s: float, now: float) -> None:
        last = keys[count - 1]
        hot = self._hot.get(last)
        if hot is None:
            if len(self._hot) >= _MOST:
                self._forget_colder_half(now)
            self._hot[last] = HotPrefix(keys[:count], lost_s, now)
        else:
            hot.lost_s, hot.at = hot.lately_s(now) + lost_s, now

    def _forget_colder_half(self, now: float) -> None:
        hots = self._hot.values()
        lost_s, at = np.array([hot.lost_s for hot in hots]), np.array([hot.at for hot in hots])
        lately_s = lost_s * _kept(now - at)
        is_hotter = lately_s > np.sort(lately_s)[len(lately_s) // 2]
        self._hot = dict(compress(self._hot.items(), is_hotter.tolist()))


def _kept(elapsed_s: Quantity) -> Quantity:
    """The part that counts of what was missed so long ago."""
    kept: Quantity = 0.5 ** (elapsed_s / HALF_LIFE_S)
    return kept
