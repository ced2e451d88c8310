"""Who counts as a member while the directory itself comes and goes."""

from collections.abc import Iterable

from perigee.kvstore.members import Member


class Membership:
    """What is believed of the cluster: what the directory said last, and after an outage also what it said before.

    A directory that has lost its memory is empty until its members have announced themselves again. Therefore nobody
    is taken to have left until `grace_s` after it is back.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._out_of_sight = False
        self._doubt_until: float | None = None
        self._members: dict[str, Member] = {}

    def lost_sight(self) -> None:
        """The directory does not answer."""
        self._out_of_sight = True

    def seen(self, members: Iterable[Member], now: float) -> tuple[Member, ...]:
        """The directory says that its members are these. Returns those to believe in, sorted by id."""
        if self._out_of_sight:
            self._out_of_sight, self._doubt_until = False, now + self._grace_s
        announced = {member.id: member for member in members}
        in_doubt = self._doubt_until is not None and now < self._doubt_until
        self._members = self._members | announced if in_doubt else announced
        return tuple(member for _, member in sorted(self._members.items()))
