"""One figure of ours beside a published one."""

from dataclasses import dataclass

from perigee.replay.paper.published import published


@dataclass(frozen=True, slots=True)
class Entry:
    """The field names are the keys of its JSON form. `why` explains a figure that differs in direction or by more than
    a factor of two; `paper` is None where nothing was published.
    """

    id: str
    what: str
    unit: str
    paper: float | None
    ours: float
    why: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.paper if self.paper else None

    @property
    def is_far(self) -> bool:
        """Whether it needs an explanation."""
        return self.ratio is not None and not 0.5 <= self.ratio <= 2.0


def entry(id: str, what: str, unit: str, ours: float, why: str = "") -> Entry:
    """With what the papers say of it."""
    return Entry(id, what, unit, published(id), round(ours, 4), why)
