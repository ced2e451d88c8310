"""What a run's losses were."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Curve:
    """Losses in nats a token. The loop fills it."""

    training: list[float] = field(default_factory=list)  # of each step's batch, before the step
    held_out: dict[int, float] = field(default_factory=dict)  # after so many steps

    @property
    def final(self) -> float:
        """The held-out loss at the end."""
        return self.held_out[max(self.held_out)]

    def first_reaching(self, loss: float) -> float | None:
        """After how many steps the held-out loss came down to `loss`, on lines between measurements; None if never."""
        before: tuple[int, float] | None = None
        for step, value in sorted(self.held_out.items()):
            if value <= loss:
                if before is None or value == before[1]:
                    return step
                part = (before[1] - loss) / (before[1] - value)
                return before[0] + part * (step - before[0])
            before = step, value
        return None

    def as_json(self) -> dict[str, Any]:
        return {"training": self.training, "held_out": {str(step): loss for step, loss in self.held_out.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Curve":
        return cls(list(values["training"]), {int(step): loss for step, loss in values["held_out"].items()})
