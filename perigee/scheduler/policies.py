"""The policies by their names, as configuration and command line give them."""

from collections.abc import Callable
from dataclasses import dataclass

from perigee.scheduler.admission import Admission, Early, Open
from perigee.scheduler.balance import Balance, Still
from perigee.scheduler.placement import LowestTtft, Placement

PLACEMENTS: dict[str, Callable[[], Placement]] = {"perigee": LowestTtft}
ADMISSIONS: dict[str, Callable[[], Admission]] = {"perigee": Early, "early": Early, "none": Open}


@dataclass(frozen=True, slots=True)
class Policies:
    """What a Conductor decides by. They may keep state, so each Conductor has its own."""

    placement: Placement
    admission: Admission
    balance: Balance


def make_policies(placement: str = "perigee", admission: str = "perigee") -> Policies:
    """Fresh policies of these names, which are keys of PLACEMENTS and ADMISSIONS."""
    return Policies(PLACEMENTS[placement](), ADMISSIONS[admission](), Still())
