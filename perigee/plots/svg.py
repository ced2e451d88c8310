"""Line plots as SVG: a file of its own, or a part of a page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 600, 360
_LEFT, _RIGHT, _BOTTOM = 64, 20, 48  # margins, in pixels
_TITLE, _LEGEND_ROW = 22, 20  # where the title stands, and what each row of the legend below it takes
_TICKS = 6
_CHARACTER = 7.2  # pixels that one takes in the legend, about

COLORS = ("#2f7ec7", "#d55e00", "#009e73", "#c77ba8", "#b8860b", "#56b4e9", "#7f7f7f")
"""For lines that have none of their own, from Okabe and Ito's: told apart on light and on dark ground, and by those who
do not tell red from green."""

DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""What lines are made of, so that they are told apart without colours, too."""

STYLE = """
  .plot text { font: 13px system-ui, sans-serif; fill: #333 } .plot .title { font-size: 15px; font-weight: 600 }
  .plot .grid { stroke: #ddd } .plot .axis { stroke: #666 }
  .plot .curve { fill: none; stroke-width: 1.8 } .plot .key { stroke-width: 2.5 }
  @media (prefers-color-scheme: dark) {
    .plot { background: #1b1b1b } .plot text { fill: #ddd } .plot .grid { stroke: #444 } .plot .axis { stroke: #999 }
  }
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Curves of one label have one entry in the legend. `dash` is one of DASHES."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dash: str = ""


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
        """The fewer of a decade, the more decades there are; where a part of one is too little for that, steps."""
        first, last = math.log10(self.low), math.log10(self.high)
        factors = (1, 2, 3, 5, 7) if last - first < 1.5 else (1, 2, 5) if last - first < 3 else (1,)
        decades = range(math.floor(first), math.ceil(last) + 1)
        values = (float(f"{factor * 10.0**decade:.1g}") for decade in decades for factor in factors)
        ticks = [value for value in values if self.low <= value <= self.high]
        return ticks if len(ticks) > 2 else self._steps()


def standalone(plot: Plot) -> str:
    """The text of an SVG file."""
    return _draw(plot, f"<style>{STYLE}</style>") + "\n"


def inline(plot: Plot) -> str:
    """For a page that has STYLE in a style sheet."""
    return _draw(plot, "")


def _draw(plot: Plot, style: str) -> str:
    legend = list(_placed(plot))
    top = _TITLE + (1 + max((row for row, _, _ in legend), default=0)) * _LEGEND_ROW + 12
    x, y = _scales(plot, top)
    middle, height = (_LEFT + WIDTH - _RIGHT) / 2, (top + HEIGHT - _BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(plot.title)}">',
        style,
        f'<text class="title" x="{_LEFT}" y="{_TITLE}">{escape(plot.title)}</text>',
        *_grid(x, y),
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(plot.x_label)}</text>',
        f'<text transform="translate(15 {height}) rotate(-90)" text-anchor="middle">{escape(plot.y_label)}</text>',
        *(_polyline(line, x, y) for line in plot.lines),
        *(_key(*each) for each in legend),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _scales(plot: Plot, top: float) -> tuple[_Scale, _Scale]:
    xs, ys = zip(*(point for line in plot.lines for point in line.points), strict=True)
    left = min(xs) if plot.logarithmic else 0.0
    bottom = min(0.0, *ys) if plot.from_zero else min(ys)
    x = _Scale(left, max(xs), _LEFT, WIDTH - _RIGHT, plot.logarithmic)
    return x, _Scale(bottom, max(ys), HEIGHT - _BOTTOM, top)


def _grid(x: _Scale, y: _Scale) -> Iterator[str]:
    for value in x.ticks():
        at = f"{x.at(value):.1f}"
        yield f'<line class="grid" x1="{at}" y1="{y.last}" x2="{at}" y2="{y.first}"/>'
        yield f'<text x="{at}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{_short(value)}</text>'
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" y1="{at}" x2="{WIDTH - _RIGHT}" y2="{at}"/>'
        yield f'<text x="{_LEFT - 7}" y="{at}" dy="4" text-anchor="end">{_short(value)}</text>'
    yield f'<path class="axis" fill="none" d="M{_LEFT} {y.last}V{y.first}H{WIDTH - _RIGHT}"/>'


def _polyline(line: Line, x: _Scale, y: _Scale) -> str:
    points = " ".join(f"{x.at(across):.1f},{y.at(up):.1f}" for across, up in line.points)
    return f'<polyline class="curve" {_stroke(line)} points="{points}"/>'


def _stroke(line: Line) -> str:
    return f'stroke="{line.color}"' + (f' stroke-dasharray="{line.dash}"' if line.dash else "")


def _short(value: float) -> str:
    """1,500,000 is 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _placed(plot: Plot) -> Iterator[tuple[int, float, Line]]:
    """Of each label the row of the legend, where in it that begins, and its line."""
    row, left = 0, float(_LEFT)
    for line in {line.label: line for line in plot.lines}.values():
        width = 36 + _CHARACTER * len(line.label) + 14
        if left > _LEFT and left + width > WIDTH:
            row, left = row + 1, float(_LEFT)
        yield row, left, line
        left += width


def _key(row: int, left: float, line: Line) -> str:
    """An entry of the legend."""
    y = _TITLE + (row + 1) * _LEGEND_ROW - 3
    return (
        f'<line class="key" x1="{left:.1f}" y1="{y}" x2="{left + 28:.1f}" y2="{y}" {_stroke(line)}/>'
        f'<text x="{left + 36:.1f}" y="{y}" dy="4">{escape(line.label)}</text>'
    )
