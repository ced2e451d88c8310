"""What is learned of how long things really take, from observations of which the last ones count most.

All are cheap to tell and to ask, and forget: a machine does not stay as it was.
"""

from dataclasses import dataclass

# Weight that an earlier observation keeps when one more comes in: the last twenty or so decide.
_KEPT = 0.95
_KEPT_LONG = 0.97  # where two numbers are learned at once

# By how much more than it is the weight of observations is taken for when they are to tell an offset from a factor.
_DOUBT = 1.05

# Beyond so many times what was predicted, an observation counts no more: a process that was stopped for a while says
# nothing of how long its work takes. One that has really become slower is still followed, a few observations later.
_STALL = 5.0


@dataclass(slots=True)
class Handling:
    """What a prompt takes beside its queue, loading and computation: messages between processes, and their turns.

    A geometric mean of the last ones, which a stall does not move far.
    """

    seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        if seconds > 0:
            self.seconds = self.seconds**_KEPT * seconds ** (1 - _KEPT) if self.seconds else seconds


@dataclass(slots=True)
class Correction:
    """Actual time as `factor` times what was predicted.

    The factor is the ratio of two decaying sums: long work counts for more than short work.
    """

    factor: float = 1.0
    _predicted_s: float = 0.0
    _actual_s: float = 0.0
    _fresh: bool = False  # observed since `relax` was last called

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """`predicted_s` is the profile's, uncorrected. What was to take no time teaches nothing, and a stall little."""
        if predicted_s <= 0:
            return
        if self._actual_s:
            actual_s = min(actual_s, _STALL * self.factor * predicted_s)
        self._predicted_s = _KEPT * self._predicted_s + predicted_s
        self._actual_s = _KEPT * self._actual_s + actual_s
        if self._actual_s:
            self.factor = self._actual_s / self._predicted_s
        self._fresh = True

    def relax(self, typical: float, kept: float) -> None:
        """Unless there was an observation since the last call, keeps only this part of the distance from `typical`, in
        orders of magnitude, and of the weight of past observations."""
        if not self._fresh:
            self.factor = typical * (self.factor / typical) ** kept
            self._predicted_s *= kept
            self._actual_s = self.factor * self._predicted_s
        self._fresh = False


@dataclass(slots=True)
class Line:
    """Actual time as `factor` times what was predicted and `offset_s` more, which is never less than nothing.

    Least squares over decaying sums, where the variance is as large as the work: without an offset that is the ratio of
    the sums. A rough profile is often wrong about what even the shortest work takes, and no factor can mend that.
    """

    factor: float = 1.0
    offset_s: float = 0.0
    _weight: float = 0.0  # the sums of 1 / predicted, 1, predicted, actual / predicted and actual
    _count: float = 0.0
    _predicted_s: float = 0.0
    _ratio: float = 0.0
    _actual_s: float = 0.0
    _fresh: bool = False

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """As Correction does."""
        if predicted_s <= 0:
            return
        if self._actual_s:
            actual_s = min(actual_s, _STALL * (self.factor * predicted_s + self.offset_s))
        self._decay(_KEPT_LONG)
        self._weight += 1 / predicted_s
        self._count += 1
        self._predicted_s += predicted_s
        self._ratio += actual_s / predicted_s
        self._actual_s += actual_s
        self._fresh = True
        self._solve()

    def relax(self, typical: "Line", kept: float) -> None:
        """As Correction does, for both numbers."""
        if not self._fresh:
            self.factor = typical.factor * (self.factor / typical.factor) ** kept
            self.offset_s = typical.offset_s + (self.offset_s - typical.offset_s) * kept
            self._decay(kept)
            self._ratio = self.factor * self._count + self.offset_s * _DOUBT * self._weight
            self._actual_s = self.factor * self._predicted_s + self.offset_s * self._count
        self._fresh = False

    def _solve(self) -> None:
        """The two normal equations, where `_DOUBT` keeps the offset at nothing while all work is of one size."""
        weight = _DOUBT * self._weight
        determinant = self._predicted_s * weight - self._count**2
        factor = (self._actual_s * weight - self._ratio * self._count) / determinant
        offset_s = (self._predicted_s * self._ratio - self._count * self._actual_s) / determinant
        if factor > 0 and offset_s > 0:
            self.factor, self.offset_s = factor, offset_s
        elif self._actual_s:
            self.factor, self.offset_s = self._actual_s / self._predicted_s, 0.0

    def _decay(self, kept: float) -> None:
        self._weight *= kept
        self._count *= kept
        self._predicted_s *= kept
        self._ratio *= kept
        self._actual_s *= kept
