"""Line plots as SVG: a file of its own, or a part of a page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 42, 46  # margins, in pixels
_TICKS = 6

COLORS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d")
"""For lines that have none of their own: told apart on light and on dark ground."""

STYLE = """
  .plot text { font: 12px system-ui, sans-serif; fill: #333 } .plot .title { font-size: 15px; font-weight: 600 }
  .plot .grid { stroke: #ddd } .plot .axis { stroke: #666 }
  .plot .curve { fill: none; stroke-width: 1.6; stroke-opacity: .85 }
  @media (prefers-color-scheme: dark) {
    .plot { background: #1b1b1b } .plot text { fill: #ddd } .plot .grid { stroke: #444 } .plot .axis { stroke: #999 }
  }
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Curves of one label have one entry in the legend."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """`lines` hold at least one point. The vertical axis covers what they do, and 0 too if it is `from_zero`; the
    horizontal one starts at 0, or, if it is `logarithmic`, at the smallest value, which is above 0.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    from_zero: bool = False
    logarithmic: bool = False
    legend: Literal["top", "bottom"] = "top"


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values between `low` and `high` to pixels between `first` and `last`."""

    low: float
    high: float
    first: float
    last: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (self._measure(each) for each in (self.low, self.high, value))
        return self.first + (value - low) / ((high - low) or 1.0) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values within the range."""
        return self._decades() if self.logarithmic else self._steps()

    def _measure(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.logarithmic else value

    def _steps(self) -> list[float]:
        raw = ((self.high - self.low) or 1.0) / _TICKS
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(index * step, 10) for index in range(first, last + 1)]

    def _decades(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = (factor * 10.0**decade for decade in decades for factor in (1, 2, 5))
        return [float(f"{value:.1g}") for value in values if self.low <= value <= self.high]


def standalone(plot: Plot) -> str:
    """The text of an SVG file."""
    return _draw(plot, f"<style>{STYLE}</style>") + "\n"


def inline(plot: Plot) -> str:
    """For a page that has STYLE in a style sheet."""
    return _draw(plot, "")


def _draw(plot: Plot, style: str) -> str:
    x, y = _scales(plot)
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(plot.title)}">',
        style,
        f'<text class="title" x="{_LEFT}" y="22">{escape(plot.title)}</text>',
        *_grid(x, y),
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(plot.x_label)}</text>',
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(plot.y_label)}</text>',
        *(_polyline(line, x, y) for line in plot.lines),
        *_legend(plot),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _scales(plot: Plot) -> tuple[_Scale, _Scale]:
    xs, ys = zip(*(point for line in plot.lines for point in line.points), strict=True)
    left = min(xs) if plot.logarithmic else 0.0
    bottom = min(0.0, *ys) if plot.from_zero else min(ys)
    x = _Scale(left, max(xs), _LEFT, WIDTH - _RIGHT, plot.logarithmic)
    return x, _Scale(bottom, max(ys), HEIGHT - _BOTTOM, _TOP)


def _grid(x: _Scale, y: _Scale) -> Iterator[str]:
    for value in x.ticks():
        at = f"{x.at(value):.1f}"
        yield f'<line class="grid" x1="{at}" y1="{_TOP}" x2="{at}" y2="{HEIGHT - _BOTTOM}"/>'
        yield f'<text x="{at}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" y1="{at}" x2="{WIDTH - _RIGHT}" y2="{at}"/>'
        yield f'<text x="{_LEFT - 7}" y="{at}" dy="4" text-anchor="end">{value:g}</text>'
    yield f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'


def _polyline(line: Line, x: _Scale, y: _Scale) -> str:
    points = " ".join(f"{x.at(across):.1f},{y.at(up):.1f}" for across, up in line.points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<polyline class="curve" stroke="{line.color}"{dash} points="{points}"/>'


def _legend(plot: Plot) -> Iterator[str]:
    labels = {line.label: line for line in plot.lines}
    first = _TOP + 14 if plot.legend == "top" else HEIGHT - _BOTTOM - 18 * len(labels)
    for top, line in zip(range(first, HEIGHT, 18), labels.values(), strict=False):
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        yield f'<line x1="{WIDTH - 250}" y1="{top}" x2="{WIDTH - 222}" y2="{top}" stroke="{line.color}"{dash}/>'
        yield f'<text x="{WIDTH - 214}" y="{top}" dy="4">{escape(line.label)}</text>'
