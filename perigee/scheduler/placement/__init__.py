"""Where a request runs, as policies over one interface."""

from perigee.scheduler.placement.base import Placement
from perigee.scheduler.placement.lowest_ttft import LowestTtft

__all__ = ["LowestTtft", "Placement"]
