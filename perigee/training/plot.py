"""Loss curves as one SVG file, which needs nothing to be shown but a browser."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 42, 46  # margins, in pixels
_TICKS = 6

_STYLE = """<style>
  text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-size: 15px; font-weight: 600 }
  .grid { stroke: #ddd } .axis { stroke: #666 } .curve { fill: none; stroke-width: 1.6; stroke-opacity: .8 }
  @media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #444 } svg { background: #1b1b1b } }
</style>"""


@dataclass(frozen=True, slots=True)
class Line:
    """Curves of one label have one entry in the legend."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values between `low` and `high` to pixels between `first` and `last`."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / ((self.high - self.low) or 1.0) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values within the range."""
        raw = ((self.high - self.low) or 1.0) / _TICKS
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(index * step, 10) for index in range(first, last + 1)]


def svg(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """The file's text. `lines` hold at least one point."""
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    x = _Scale(0, max(xs), _LEFT, WIDTH - _RIGHT)
    y = _Scale(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        _STYLE,
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
        *_grid(x, y),
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
        *(_polyline(line, x, y) for line in lines),
        *_legend(lines),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


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
    points = " ".join(f"{x.at(step):.1f},{y.at(loss):.1f}" for step, loss in line.points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<polyline class="curve" stroke="{line.color}"{dash} points="{points}"/>'


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    for index, line in enumerate({line.label: line for line in lines}.values()):
        top = _TOP + 14 + 18 * index
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        yield f'<line x1="{WIDTH - 250}" y1="{top}" x2="{WIDTH - 222}" y2="{top}" stroke="{line.color}"{dash}/>'
        yield f'<text x="{WIDTH - 214}" y="{top}" dy="4">{escape(line.label)}</text>'
