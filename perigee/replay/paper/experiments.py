"""The experiments: each says what it needs run, and what comes out of that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perigee.plots.page import Section
from perigee.replay.paper.entry import Entry
from perigee.replay.paper.lab import Lab, Trial


@dataclass(frozen=True, slots=True)
class Experiment:
    """`trials` must have been run before `entries` and `section` are asked for."""

    name: str
    trials: Sequence[Trial]
    entries: Callable[[Lab], list[Entry]]
    section: Callable[[Lab, Sequence[Entry]], Section]
