"""Plots and pages: what can be shown of them without a browser."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from perigee.plots.page import Section, Table, page
from perigee.plots.svg import DASHES, HEIGHT, WIDTH, Line, Plot, inline, standalone


def plot(**fields: object) -> Plot:
    lines = [
        Line("a < b", "#123456", [(1.0, 5.0), (100.0, 50.0)]),
        Line("c", "#654321", [(10.0, 20.0)], dash=DASHES[1]),
    ]
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


@pytest.mark.parametrize("labels", [["a"], ["a", "b"], [f"a long name of a line, {index}" for index in range(5)]])
def test_the_legend_stands_above_the_frame_within_the_width(labels: list[str]) -> None:
    lines = [Line(label, "#000", [(0.0, 0.0), (1.0, 1.0)]) for label in labels]
    svg = ElementTree.fromstring(standalone(Plot("", "", "", lines)))
    keys = [line for line in svg.findall("{*}line") if line.attrib["class"] == "key"]
    top = min(y for curve in points(standalone(Plot("", "", "", lines))) for _, y in curve)
    assert len(keys) == len(labels)
    assert all(float(key.attrib["y1"]) < top and float(key.attrib["x2"]) < WIDTH for key in keys)


@pytest.mark.parametrize(("low", "high"), [(0.0193, 0.0197), (0.02, 0.07), (0.3, 40.0), (1e-6, 100.0), (5.0, 5.0)])
def test_a_logarithmic_axis_has_values_to_read_off(low: float, high: float) -> None:
    svg = standalone(Plot("", "", "", [Line("a", "#000", [(low, 0.0), (high, 1.0)])], logarithmic=True))
    across = [text for text in ElementTree.fromstring(svg).findall("{*}text") if text.get("text-anchor") == "middle"]
    values = [float(text.text) for text in across if text.text]
    assert len(values) >= (3 if high > low else 1)
    assert all(low * 0.999 <= value <= high * 1.001 for value in values)


def test_large_values_are_short() -> None:
    svg = standalone(Plot("", "", "", [Line("a", "#000", [(0.0, 0.0), (1.0, 1_500_000.0)])], from_zero=True))
    assert {"500k", "1M", "1.5M"} <= {text.text for text in ElementTree.fromstring(svg).findall("{*}text")}


def test_columns_of_figures_stand_to_the_right_and_others_to_the_left() -> None:
    table = Table(("what", "where", "much"), [("a", "here", "–"), ("b", "3 there", "-7.5 s")], notes=["Mind <this>."])
    text = page("", [Section("", tables=[table])])
    assert text.count('<th class="text">') == 2 and "<th>much</th>" in text
    assert '<td class="text">3 there</td><td>-7.5 s</td>' in text
    assert "Mind &lt;this&gt;." in text


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
