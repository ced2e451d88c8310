"""What a request is promised, and how urgent it is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Of `RequestArrived.priority`, where higher goes first.
MIN_PRIORITY, MAX_PRIORITY = -10, 10


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds on a request's latencies in seconds; infinity asks for nothing."""

    ttft_s: float = math.inf
    tbt_s: float = math.inf


NO_SLO = Slo()


def parse_classes(entries: Iterable[str]) -> dict[str, Slo]:
    """SLOs by name, from `NAME=TTFT:TBT` in seconds, where `-` asks for nothing. Raises ValueError."""
    return dict(_parse_class(entry.strip()) for entry in entries)


def _parse_class(entry: str) -> tuple[str, Slo]:
    name, equals, bounds = entry.partition("=")
    ttft, colon, tbt = bounds.partition(":")
    if not (name and equals and colon):
        raise ValueError(f"{entry!r} is no class; expected NAME=TTFT:TBT, such as interactive=2:0.1 or batch=-:-")
    return name, Slo(_bound(entry, ttft), _bound(entry, tbt))


def _bound(entry: str, text: str) -> float:
    if text == "-":
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"{entry!r}: {text!r} is no bound; allowed are seconds above 0, or - for none")
    return seconds
