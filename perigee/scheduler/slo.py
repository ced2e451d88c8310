"""What a request is promised."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds on a request's latencies in seconds; infinity asks for nothing."""

    ttft_s: float = math.inf
    tbt_s: float = math.inf


NO_SLO = Slo()
