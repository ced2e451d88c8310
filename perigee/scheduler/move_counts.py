"""How often anything was moved while no request asked for it."""

from dataclasses import dataclass


@dataclass(slots=True)
class MoveCounts:
    """Since the Conductor's start. The ClusterView fills it.

    `role_changes` are those that workers reported, whoever wanted them; `drains` those that were begun.
    """

    replications: int = 0
    replicated_blocks: int = 0
    trims: int = 0
    trimmed_blocks: int = 0
    drains: int = 0
    role_changes: int = 0
