"""How long answers get, learned from those that ended.

P(output tokens | generated so far, prompt length, limit, tenant). Answers end in two ways. Some run into `max_tokens`:
how many do is counted for each magnitude of the limit. The others end by themselves: for each magnitude of the prompt,
and each tenant within it, there is a histogram of their lengths over logarithmic buckets. Where a group has shown
little, its parent speaks for it: a group counts as if it had seen a few answers distributed as its parent's. Counts
decay, so that what was learned follows what comes; and all tables are bounded.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_PER_OCTAVE = 16
_NUM_BUCKETS = 20 * _PER_OCTAVE  # up to a million tokens
_NUM_ROWS = 256  # groups that are told apart; the one that learned least recently gives way
_NUM_NUMBERS = 256 * _NUM_ROWS  # of groups that gave way, so many are not mistaken for those that took their rows
_NUM_LIMITS = 256
_HALF_LIFE = 500.0  # in answers of a group
_KEPT = 0.5 ** (1 / _HALF_LIFE)
_PARENT_WEIGHT = 10.0  # in answers

# Before anything is learned each magnitude between a few dozen tokens and two thousand is as likely as any other.
_PRIOR_OCTAVES = 5, 11
_PRIOR: Floats = np.interp(np.arange(_NUM_BUCKETS + 1) / _PER_OCTAVE, _PRIOR_OCTAVES, (1.0, 0.0))
_PRIOR_WEIGHT = 10.0  # in answers; so many of them, and it is forgotten

# Part of the distribution that follows no data, P(length > n) = 1 / (n + 1): whatever has run for n tokens, longer than
# any answer before, is then as likely as not to end before 2 n.
_UNKNOWN = 1e-3


class Odds(NamedTuple):
    """What is expected of one answer: the number of its group, its limit in tokens, the probability to reach the limit,
    and the one to be longer than that, were there no limit."""

    group: int
    limit: float
    reaches: float
    beyond: float


@dataclass(slots=True)
class _Group:
    """How many answers were longer than each bucket's lower edge. The survival function that comes of it is in a row of
    the table, once it is asked for.
    """

    number: int
    parent: "_Group | None" = None
    longer: Floats = field(default_factory=lambda: np.zeros(_NUM_BUCKETS + 1))
    total: float = 0.0
    num_added: int = 0
    num_shown: int = -1  # answers, its parents' included, that its row in the table shows

    @property
    def row(self) -> int:
        return self.number % _NUM_ROWS

    def add(self, bucket: int) -> None:
        self.longer *= _KEPT
        self.longer[: bucket + 1] += 1.0
        self.total = _KEPT * self.total + 1.0
        self.num_added += 1


@dataclass(slots=True)
class _Reaching:
    """Decaying counts of answers, and of those among them that ran into their limit."""

    reached: float = 0.0
    total: float = 0.0

    def add(self, reached: bool) -> None:
        self.reached = _KEPT * self.reached + reached
        self.total = _KEPT * self.total + 1.0

    def share(self, parent: float) -> float:
        return (self.reached + _PARENT_WEIGHT * parent) / (self.total + _PARENT_WEIGHT)


class LengthModel:
    """Until the first answer has ended, an answer may as well have 50 tokens as 500."""

    def __init__(self) -> None:
        self._survival = np.zeros((_NUM_ROWS, _NUM_BUCKETS + 1))  # P(longer than the bucket's lower edge)
        self._rows = np.arange(_NUM_NUMBERS) % _NUM_ROWS  # by number; of what gave way, the row of all
        self._root = _Group(0)
        self._groups: dict[tuple[str, int], _Group] = {}  # by tenant ("" for all) and prompt; oldest learner first
        self._reaching = _Reaching()
        self._limits: dict[tuple[str, int], _Reaching] = {}  # the same by limit

    # ---- learning

    def observe(self, num_tokens: int, max_tokens: int, tenant: str, output_tokens: int) -> None:
        """An answer to a prompt of `num_tokens` has ended."""
        reached = output_tokens >= max_tokens
        self._reaching.add(reached)
        for owner in ("", tenant) if tenant else ("",):
            self._limit_of(owner, max_tokens).add(reached)
        if not reached:
            bucket = min(_NUM_BUCKETS - 1, int(_position(output_tokens)))
            for group in (*self._groups_of(tenant, num_tokens), self._root):
                group.add(bucket)

    def _groups_of(self, tenant: str, num_tokens: int) -> list[_Group]:
        """The tenant's group and its parent, the prompt's, which is thereby the last to give way."""
        magnitude = num_tokens.bit_length()
        own = [self._touch((tenant, magnitude))] if tenant else []
        of_all = self._touch(("", magnitude))
        of_all.parent = self._root
        for group in own:
            group.parent = of_all
        return [*own, of_all]

    def _touch(self, name: tuple[str, int]) -> _Group:
        group = self._groups.pop(name, None)
        if group is None:
            number = len(self._groups) + 1
            group = _Group(number if number < _NUM_ROWS else self._give_way())
        self._groups[name] = group
        return group

    def _give_way(self) -> int:
        """Forgets the group that learned least recently. Returns the next number of its row."""
        oldest = self._groups.pop(next(iter(self._groups)))
        self._rows[oldest.number] = self._root.row  # answers are still running of which its number is known
        number = (oldest.number + _NUM_ROWS) % _NUM_NUMBERS
        self._rows[number] = oldest.row
        return number

    def _limit_of(self, tenant: str, max_tokens: int) -> _Reaching:
        name = (tenant, max_tokens.bit_length())
        limit = self._limits.pop(name, None) or _Reaching()
        if len(self._limits) == _NUM_LIMITS:
            del self._limits[next(iter(self._limits))]
        self._limits[name] = limit
        return limit

    # ---- predicting

    def odds(self, num_tokens: int, max_tokens: int, tenant: str = "") -> Odds:
        """What to expect of the answer to a prompt of `num_tokens`."""
        group = self._known_group(tenant, num_tokens.bit_length())
        self._refresh(group)
        beyond = self._beyond(group.row, max_tokens)
        reaches = self._reaches(tenant, max_tokens.bit_length()) if beyond < 1.0 - _UNKNOWN else 1.0
        return Odds(group.number, float(max_tokens), reaches, beyond)

    def survival(self, odds: Odds, generated: float) -> float:
        """P(the answer has more than `generated` tokens): 1 at 0, falling, and 0 from the limit on."""
        group, limit, reaches, beyond = (np.array([value]) for value in odds)
        return float(self.survivals(group, limit, reaches, beyond, np.array([float(generated)]))[0])

    def survivals(
        self, group: NDArray[np.intp], limit: Floats, reaches: Floats, beyond: Floats, generated: Floats
    ) -> Floats:
        """The same for many answers; `generated` is [answers], or [times, answers] for several counts of each."""
        slope = (1.0 - reaches) / np.maximum(1.0 - beyond, _UNKNOWN)
        longer = reaches + slope * np.maximum(self._unlimited(self._rows[group], generated) - beyond, 0.0)
        return longer * (generated < limit)

    def _reaches(self, tenant: str, magnitude: int) -> float:
        """The probability that an answer runs into a limit of this magnitude."""
        share = self._reaching.reached / max(self._reaching.total, 1.0)
        for owner in ("", tenant) if tenant else ("",):
            if (counts := self._limits.get((owner, magnitude))) is not None:
                share = counts.share(share)
        return share

    def _known_group(self, tenant: str, magnitude: int) -> _Group:
        return self._groups.get((tenant, magnitude)) or self._groups.get(("", magnitude)) or self._root

    def _refresh(self, group: _Group) -> int:
        """Brings the group's row up to date with its own answers and its parents'. Returns how many these are."""
        parent = group.parent
        num_added = group.num_added + (self._refresh(parent) if parent is not None else 0)
        if num_added != group.num_shown:
            group.num_shown = num_added
            inherited = self._survival[parent.row] if parent else _PRIOR
            weight = _PARENT_WEIGHT if parent else max(0.0, _PRIOR_WEIGHT - group.total)
            self._survival[group.row] = (group.longer + weight * inherited) / (group.total + weight)
        return num_added

    def _beyond(self, row: int, tokens: int) -> float:
        """P(more than so many tokens), were there no limit, for one group: linear between the edges of the buckets."""
        lower, part = divmod(min(_PER_OCTAVE * math.log2(tokens + 1.0), _NUM_BUCKETS - 1e-9), 1.0)
        below, above = self._survival[row, int(lower) : int(lower) + 2].tolist()
        learned: float = below + part * (above - below)
        return (1.0 - _UNKNOWN) * learned + _UNKNOWN / (tokens + 1.0)

    def _unlimited(self, row: NDArray[np.intp], generated: Floats) -> Floats:
        """The same for many."""
        position = np.minimum(_PER_OCTAVE * np.log2(generated + 1.0), _NUM_BUCKETS - 1e-9)
        lower = position.astype(np.intp)
        below, above = self._survival[row, lower], self._survival[row, lower + 1]
        learned = below + (position - lower) * (above - below)
        chance: Floats = (1.0 - _UNKNOWN) * learned + _UNKNOWN / (generated + 1.0)
        return chance


def _position(tokens: float) -> float:
    """Where a length lies among the buckets."""
    return _PER_OCTAVE * math.log2(max(tokens, 1.0))
