"""How long steps take, by a cost profile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perigee.scheduler.cost import CostProfile
from perigee.workers.engine.batcher import Chunk

# Of a step's end, which is computed in another way than the step's length: far below any length, far above rounding.
_ROUNDING_S = 1e-9


@dataclass(frozen=True, slots=True)
class Run:
    """Decode steps of a batch that does not change. Each takes `growth_s` longer than the one before, for each adds a
    token to every context: step time is linear in that.
    """

    first_s: float
    growth_s: float = 0.0

    def elapsed_s(self, steps: int) -> float:
        """What the first `steps` steps take together."""
        return steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    def steps_within(self, elapsed_s: float) -> int:
        """How many steps have ended after so long."""
        half = self.growth_s / 2
        linear = self.first_s - half
        root = math.sqrt(linear * linear + 4 * half * max(0.0, elapsed_s + _ROUNDING_S))
        return int(2 * (elapsed_s + _ROUNDING_S) / (linear + root))


def run_of(profile: CostProfile, chunks: Sequence[Chunk]) -> Run:
    """The steps that begin with these chunks, all of decoding sequences."""
    batch, context = len(chunks), sum(chunk.stop for chunk in chunks)
    first_s = profile.step_s(batch, context)
    return Run(first_s, profile.step_s(batch, context + batch) - first_s)


def step_s(profile: CostProfile, chunks: Sequence[Chunk]) -> float:
    """One step. Several prompts in it read the weights once."""
    prompts = [chunk for chunk in chunks if chunk.length > 1]
    batch, context = len(chunks) - len(prompts), sum(chunk.stop for chunk in chunks if chunk.length == 1)
    if not prompts:
        return profile.step_s(batch, context)
    first, *others = prompts
    more_s = sum(profile.prefill_s(chunk.length, chunk.start) - profile.prefill_fixed_s for chunk in others)
    return profile.mixed_s(first.length, first.start, batch, context) + more_s
