"""Balance policies: what moves in the cluster while no request asks for it."""

from perigee.scheduler.balance.base import Balance, Move, Several, Still
from perigee.scheduler.balance.copies import Copies
from perigee.scheduler.balance.roles import Roles

__all__ = ["Balance", "Copies", "Move", "Roles", "Several", "Still"]
