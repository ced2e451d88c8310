"""How long things take: a profile from a roofline or from measurements, corrected by what workers show."""

from perigee.scheduler.cost.model import CostModel, CostProfile, WorkerCost

__all__ = ["CostModel", "CostProfile", "WorkerCost"]
