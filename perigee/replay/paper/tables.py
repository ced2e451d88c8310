"""Ours beside theirs, as tables."""

from collections.abc import Sequence

from perigee.plots.page import Table
from perigee.replay.paper.entry import Entry


def of_entries(entries: Sequence[Entry]) -> Table:
    """One row a figure. Where ours is far from theirs, a number tells which note explains it."""
    notes = list(dict.fromkeys(filter(None, map(why, entries))))
    rows = [
        [each.what, each.unit, number(each.paper), number(each.ours), f"{_ratio(each)}{_mark(why(each), notes)}"]
        for each in entries
    ]
    numbered = [f"[{index}] {note}" for index, note in enumerate(notes, 1)]
    return Table(["what", "unit", "paper", "ours", "ours / paper"], rows, numbered)


def _mark(note: str, notes: Sequence[str]) -> str:
    return f" [{notes.index(note) + 1}]" if note else ""


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def why(each: Entry) -> str:
    return each.why if each.is_far else ""


def _ratio(each: Entry) -> str:
    return "–" if each.ratio is None else f"{each.ratio:.2f}"
