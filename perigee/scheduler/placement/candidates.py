"""Workers that a phase of a request may go to, with a score for each: the smaller, the better."""

from dataclasses import dataclass

import numpy as np

from perigee.scheduler.fleet import Fleet, Floats, Rows

# Predictions that differ by less say nothing about who is better. To always follow them would send everything to one of
# two equal workers.
NEAR = 1.05

# How many alternatives a plan names, for the receipt.
_MAX_OTHERS = 3


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows of the fleet, at least one, and their scores: seconds, or something like it."""

    rows: Rows
    scores: Floats

    def near(self) -> Rows:
        """Those whose score is as good as the lowest."""
        good: Rows = self.rows[self.scores <= NEAR * self.scores.item(self.scores.argmin())]
        return good

    def others(self, chosen: int) -> list[int]:
        """The best few rows beside the chosen one, the best first."""
        scores, best = self.scores.copy(), []
        for _ in range(min(len(scores), _MAX_OTHERS + 1)):
            index = scores.argmin()
            scores[index] = np.inf
            best.append(self.rows.item(index))
        return [row for row in best if row != chosen][:_MAX_OTHERS]


def others(rows: Rows, chosen: int) -> list[int]:
    """The first few of rows that are equally good, beside the chosen one."""
    return [row for row in rows[: _MAX_OTHERS + 1].tolist() if row != chosen][:_MAX_OTHERS]


def least_recent(fleet: Fleet, rows: Rows) -> int:
    """Of these rows that whose worker was chosen least recently; the first of several."""
    return rows.item(fleet.last_chosen[rows].argmin())
