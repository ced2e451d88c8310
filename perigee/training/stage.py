"""A part of a run: sequences of one length, under one kind of attention."""

from dataclasses import dataclass

from perigee.workers.model.moba_config import MobaConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """`steps` steps with batches of `sequences` sequences of `length` tokens."""

    length: int
    sequences: int
    steps: int
    moba: str = ""  # block-sparse attention, as `MobaConfig.parse` reads it; empty: full attention
    recall: float = 0.0  # the share of sequences that are recall exercises instead of text
    max_facts: int = 1  # that one of those states
    answers: bool = False  # whether those have answers in other words, which count as their keys' digits do

    @property
    def attention(self) -> MobaConfig | None:
        return MobaConfig.parse(self.moba) if self.moba else None
