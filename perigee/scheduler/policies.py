"""The policies by their names, as configuration and command line give them."""

from collections.abc import Callable
from dataclasses import dataclass

from perigee.scheduler.admission import Admission, AtDecode, Early, Foresight, Open, Prediction, Refusal
from perigee.scheduler.balance import Balance, Copies, Roles, Several, Still
from perigee.scheduler.balance.roles import DEFAULT_HOLD_S
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.placement import (
    Algorithm1,
    CheaperFetch,
    LeastLoaded,
    NoFetch,
    Placement,
    Random,
    RoundRobin,
    ThresholdFetch,
)
from perigee.scheduler.plan import Plan
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView

PLACEMENTS: dict[str, Callable[[], Placement]] = {
    "perigee": lambda: Algorithm1(CheaperFetch(), price=1.0),
    "global-cache": lambda: Algorithm1(ThresholdFetch()),
    "local-cache": lambda: Algorithm1(NoFetch()),
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
    "random": Random,
}
ADMISSIONS: dict[str, Callable[[], Admission]] = {
    "perigee": Foresight,
    "prediction": Prediction,
    "early": Early,
    "at-decode": AtDecode,
    "none": Open,
}
# Given for how many seconds an imbalance must last before a worker changes pools.
BALANCES: dict[str, Callable[[float], Balance]] = {
    "perigee": lambda hold_s: Several(Roles(hold_s), Copies()),
    "copies": lambda hold_s: Copies(),
    "roles": Roles,
    "none": lambda hold_s: Still(),
}


@dataclass(frozen=True, slots=True)
class PolicyNames:
    """What policies are called, in configuration, receipts and recordings."""

    placement: str = "perigee"
    admission: str = "perigee"
    balance: str = "roles"


@dataclass(frozen=True, slots=True)
class Policies:
    """What a Conductor decides by. They may keep state, so each Conductor has its own."""

    placement: Placement
    admission: Admission
    balance: Balance
    names: PolicyNames = PolicyNames()

    def plan(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> tuple[Plan, Refusal | None]:
        """Where the request goes, and why it is not let in, if it is not. What is refused for a promise to others that
        is stricter than its own is tried once more, on the decode workers where nobody was promised as much.
        """
        plan = self.placement.place(view, pools, request, now)
        refusal = self.admission.admit(view, request, plan, now)
        if refusal is not None and refusal.for_others:
            lax = pools.without(view.forecast.stricter(request.slo.tbt_s))
            if lax.can_serve:
                return self.plan(view, lax, request, now)
        return plan, refusal


def parse_policies(text: str) -> PolicyNames:
    """`placement=NAME,admission=NAME`, of which one may be left out. Raises ValueError for anything else."""
    names = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if unknown := names.keys() - {"placement", "admission"}:
        raise ValueError(f"{min(unknown)!r}: allowed are placement=NAME and admission=NAME, with a comma between them")
    for kind, allowed in (("placement", PLACEMENTS), ("admission", ADMISSIONS)):
        if kind in names and names[kind] not in allowed:
            raise ValueError(f"{kind}: {names[kind]!r}: allowed are {', '.join(sorted(allowed))}")
    return PolicyNames(**names)


def make_policies(
    placement: str = "perigee",
    admission: str = "perigee",
    balance: str = "roles",
    role_hold_s: float = DEFAULT_HOLD_S,
) -> Policies:
    """Fresh policies of these names, which are keys of PLACEMENTS, ADMISSIONS and BALANCES."""
    names = PolicyNames(placement, admission, balance)
    return Policies(PLACEMENTS[placement](), ADMISSIONS[admission](), BALANCES[balance](role_hold_s), names)
