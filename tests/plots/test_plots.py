"""Plots and pages: what can be shown of them without a browser."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from perigee.plots.page import Section, Table, page
from perigee.plots.svg import HEIGHT, WIDTH, Line, Plot, inline, standalone


def plot(**fields: object) -> Plot:
    lines = [Line("a < b", "#123456", [(1.0, 5.0), (100.0, 50.0)]), Line("c", "#654321", [(10.0, 20.0)], dashed=True)]
    return Plot("Title & more", "seconds", "requests", lines, **fields)  # type: ignore[arg-type]


def points(svg: str) -> list[list[tuple[float, float]]]:
    curves = ElementTree.fromstring(svg).findall("{*}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in curve.attrib["points"].split()] for curve in curves]  # type: ignore[misc]


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("from_zero", [False, True])
def test_every_point_lies_within_the_frame(logarithmic: bool, from_zero: bool) -> None:
    curves = points(standalone(plot(logarithmic=logarithmic, from_zero=from_zero)))
    assert [len(curve) for curve in curves] == [2, 1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for curve in curves for x, y in curve)


def test_a_logarithmic_axis_gives_each_decade_the_same_width() -> None:
    ((first, _), (last, _)), ((middle, _),) = points(standalone(plot(logarithmic=True)))
    assert middle - first == pytest.approx(last - middle, abs=0.2)


def test_an_axis_from_zero_has_zero_at_the_bottom() -> None:
    lines = [Line("a", "#000", [(0.0, 0.0), (1.0, 8.0)]), Line("b", "#000", [(0.0, 4.0), (1.0, 8.0)])]
    (zero, _), (four, eight) = points(standalone(Plot("", "", "", lines, from_zero=True)))
    assert zero[1] - four[1] == pytest.approx(four[1] - eight[1], abs=0.2)


def test_a_plot_of_one_value_is_drawn() -> None:
    assert points(standalone(Plot("", "", "", [Line("a", "#000", [(0.0, 3.0)])])))


def test_text_is_escaped() -> None:
    assert "a &lt; b" in inline(plot()) and "Title &amp; more" in inline(plot())


class Outline(HTMLParser):
    """The tags of a page, and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_from_elsewhere_and_is_well_formed() -> None:
    section = Section("Figures", "Some <text>.", [Table(("", "n"), [("a", "1")])], [plot(), plot()])
    outline = Outline(page("A & B", [section]))
    assert outline.open == []
    assert outline.references == [] and "script" not in outline.tags
    assert (outline.tags.count("svg"), outline.tags.count("td"), outline.tags.count("style")) == (2, 2, 1)


def test_a_page_can_be_read_in_the_dark() -> None:
    text = page("", [])
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text
