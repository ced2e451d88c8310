"""How full a worker may get for whom."""

HEADROOM = 0.1
MIN_LIMIT = 0.5
_SEEN_FOR_S = 60.0
_DEFAULT_PRIORITY = 0


class Headroom:
    """A tenth of each worker is kept free for each level of priority above a request's own: above level 0, which counts
    as always there, only for those levels that asked within the last minute. A request of a tenant that has more than
    its fair share counts as one level lower. At least a half is for everyone.
    """

    def __init__(self) -> None:
        self._asked_at: dict[int, float] = {}  # by priority

    def asked(self, priority: int, now: float) -> None:
        """A request of this priority has arrived."""
        self._asked_at[priority] = now

    def limit(self, priority: int, above_share: bool, now: float) -> float:
        """The load, 1 being full, up to which such a request is let in."""
        present = {other for other, at in self._asked_at.items() if now - at <= _SEEN_FOR_S} | {_DEFAULT_PRIORITY}
        levels = sum(other > priority for other in present) + above_share
        return max(MIN_LIMIT, 1.0 - HEADROOM * levels)
