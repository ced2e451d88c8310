"""Ours beside theirs, as tables."""

from collections.abc import Sequence

from perigee.plots.page import Table
from perigee.replay.paper.entry import Entry


def of_entries(entries: Sequence[Entry]) -> Table:
    """One row a figure. An explanation stands where ours is far from theirs."""
    rows = [[each.what, each.unit, number(each.paper), number(each.ours), _ratio(each), why(each)] for each in entries]
    return Table(["what", "unit", "paper", "ours", "ours / paper", "why"], rows)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def why(each: Entry) -> str:
    return each.why if each.is_far else ""


def _ratio(each: Entry) -> str:
    return "–" if each.ratio is None else f"{each.ratio:.2f}"
