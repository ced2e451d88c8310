"""Where a request runs, as policies over one interface."""

from perigee.scheduler.placement.algorithm1 import Algorithm1
from perigee.scheduler.placement.base import Placement
from perigee.scheduler.placement.blind import LeastLoaded, Random, RoundRobin
from perigee.scheduler.placement.fetching import CheaperFetch, NoFetch, ThresholdFetch

__all__ = [
    "Algorithm1",
    "CheaperFetch",
    "LeastLoaded",
    "NoFetch",
    "Placement",
    "Random",
    "RoundRobin",
    "ThresholdFetch",
]
