"""Role switching: a worker of a pool that has little to do goes over to the pool that has too much.

Both pools are measured alike, by the workers that their work would fill. One is short of workers above HIGH_MARK; the
other can spare one if it would still be below LOW_MARK without it. As what was given away leaves the giver well below
the mark at which it would ask for it back, the same load never moves a worker twice; and as the imbalance must have
lasted for as long as the move will take, a move costs at most what not to have moved has cost already, however the load
goes on.

The worker is drained first: it gets no more work, finishes what it has, and is told to change pools when nothing of it
is left. So no request notices. What does not come to its end in time is given up, and the worker works on as before.
"""

from dataclasses import dataclass

from perigee.scheduler.balance.base import Move
from perigee.scheduler.balance.donor import choose_donor
from perigee.scheduler.balance.pressure import Pressure, Side
from perigee.scheduler.commands import Drain, SetRole
from perigee.scheduler.ids import WorkerId
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView, Phase
from perigee.scheduler.worker_view import WorkerView

HIGH_MARK = 0.8
LOW_MARK = 0.6

# How long an imbalance must last. The pools are smoothed over as long, rest twice as long after each switch, and a
# worker that could not be switched is spared for this many times as long.
DEFAULT_HOLD_S = 15.0
_REST = 2.0
_SPARED = 8.0

# A worker has changed pools, or says why not, within this; it is asked again, for it may have been a moment too early.
_CONFIRM_S = 10.0
_ASK_AGAIN_S = 2.0

# A worker that needs this many times as long as predicted to come to its end, and this many seconds more, is let be.
_PATIENCE = 2.0
_PATIENCE_S = 60.0

_OTHER = {"prefill": "decode", "decode": "prefill"}


@dataclass(slots=True)
class Switch:
    """One worker on its way to `role`. It was first told at `told_at`, and last at `asked_at`, if it was."""

    worker: WorkerId
    incarnation: str
    role: str
    until: float
    told_at: float | None = None
    asked_at: float = 0.0


class Roles:
    """At most one worker is on its way. `hold_s` is the unit of all its patience."""

    makes_copies = False

    def __init__(self, hold_s: float = DEFAULT_HOLD_S) -> None:
        self._hold_s = hold_s
        self._pressure = Pressure(hold_s)
        self._needy = ""  # the pool that has needed one more since then, and could have it
        self._since = 0.0
        self._rest_until = 0.0
        self._spared: dict[WorkerId, float] = {}  # until when
        self._switch: Switch | None = None

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        pools = view.pools(now)
        sides = self._pressure.observe(view, pools, now)
        self._note_need(_needy(pools, sides), now)
        if self._switch is not None:
            return self._follow(view, self._switch, sides, now)
        if not self._needy or now < self._rest_until:
            return []
        return self._begin(view, pools, self._needy, now)

    def _note_need(self, needy: str, now: float) -> None:
        if needy != self._needy:
            self._needy, self._since = needy, now

    def _begin(self, view: ClusterView, pools: Pools, needy: str, now: float) -> list[Move]:
        self._spared = {worker: until for worker, until in self._spared.items() if until > now}
        donor = choose_donor(view, pools, _OTHER[needy], self._spared, now)
        if donor is None or now - self._since < max(self._hold_s, donor[1]):
            return []
        worker, drain_s = donor
        until = now + _PATIENCE * drain_s + _PATIENCE_S
        self._switch = Switch(worker.id, worker.incarnation, needy, until)
        return [Drain(worker.id, worker.incarnation, True, f"the {needy} pool needs it")]

    # ---- a worker on its way

    def _follow(self, view: ClusterView, switch: Switch, sides: dict[str, Side], now: float) -> list[Move]:
        worker = view.workers.get(switch.worker)
        if worker is None or worker.incarnation != switch.incarnation or worker.report is None:
            self._switch = None
            return []
        if worker.report.role == switch.role:
            return self._end(switch, now, f"it is in the {switch.role} pool")
        if why := self._hopeless(switch, sides, now):
            self._spared[switch.worker] = now + _SPARED * self._hold_s
            return self._end(switch, now, why)
        return self._ask(switch, now) if _is_empty(view, worker) else []

    def _hopeless(self, switch: Switch, sides: dict[str, Side], now: float) -> str:
        """Why the worker is to stay what it is, if it is."""
        if switch.told_at is not None:
            return "it has not changed pools" if now > switch.told_at + _CONFIRM_S else ""
        if now > switch.until:
            return "it has not come to its end in time"
        return "its own pool needs it" if sides[_OTHER[switch.role]].load >= HIGH_MARK else ""

    def _ask(self, switch: Switch, now: float) -> list[Move]:
        if switch.told_at is None:
            switch.told_at = now
        elif now < switch.asked_at + _ASK_AGAIN_S:
            return []
        switch.asked_at = now
        return [SetRole(switch.worker, switch.incarnation, switch.role)]

    def _end(self, switch: Switch, now: float, why: str) -> list[Move]:
        self._switch, self._needy = None, ""
        self._rest_until = now + _REST * self._hold_s
        return [Drain(switch.worker, switch.incarnation, False, why)]


def _needy(pools: Pools, sides: dict[str, Side]) -> str:
    """The pool that needs one more worker and could have it; empty if there is none. Mixed workers need no balance."""
    if pools.mixed_rows.size:
        return ""
    for role, side in sides.items():
        other = sides[_OTHER[role]]
        if side.workers and side.load >= HIGH_MARK and other.load_on(other.workers - 1) <= LOW_MARK:
            return role
    return ""


def _is_empty(view: ClusterView, worker: WorkerView) -> bool:
    """Whether nothing is on the worker, ours or another's. What it prefilled is there until decode has it."""
    report = worker.report
    if report is None or worker.prefills or worker.decodes or report.running_sequences or report.queued_sequences:
        return False
    return not any(
        request.prefill == worker.id and request.phase is Phase.HANDOVER for request in view.requests.values()
    )
