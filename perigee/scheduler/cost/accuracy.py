"""How far predictions were from what came, over a window of the last ones."""

from collections import deque
from dataclasses import dataclass

import numpy as np

# A few hundred: what was wrong an hour ago tells nothing of the predictions that are made now.
WINDOW = 400


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Of |predicted - actual| / actual; `bias` is the median of (predicted - actual) / actual. All 0 without any."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    bias: float = 0.0


class Accuracy:
    """Relative errors of one kind of prediction. `observations` counts all there ever were, the rest the window's."""

    def __init__(self, window: int = WINDOW) -> None:
        self.observations = 0
        self._errors: deque[float] = deque(maxlen=window)

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """What took no time cannot be compared with."""
        if actual_s > 0:
            self.observations += 1
            self._errors.append((predicted_s - actual_s) / actual_s)

    @property
    def mean(self) -> float:
        return self.summary().mean

    def summary(self) -> ErrorSummary:
        """The window's figures. Takes a fraction of a millisecond, so it is for whoever asks now and then."""
        if not self._errors:
            return ErrorSummary()
        signed = np.array(self._errors)
        absolute = np.abs(signed)
        p50, p90 = np.quantile(absolute, [0.5, 0.9]).tolist()
        return ErrorSummary(len(signed), float(absolute.mean()), p50, p90, float(np.median(signed)))
