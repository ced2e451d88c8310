"""One HTML file with tables and plots, without a script or anything from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from perigee.plots.svg import STYLE, Plot, inline

_STYLE = """
  :root { color-scheme: light dark }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 1600px; margin: 2rem auto; padding: 0 1rem }
  h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
  table { border-collapse: collapse; margin: .7rem 0 } th, td { padding: .2rem .8rem; text-align: right }
  th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #8884 }
  .plots { display: flex; flex-wrap: wrap; gap: 1rem } .plots svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells as there are in `head`, which may be empty."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it: text, tables, plots, in this order."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The file's text."""
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(_section(section) for section in sections),
            "</body></html>\n",
        ]
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    parts += (_table(table) for table in section.tables)
    if section.plots:
        parts += ['<div class="plots">', *(inline(plot) for plot in section.plots), "</div>"]
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = _row("th", table.head) if table.head else ""
    return f"<table>{head}{''.join(_row('td', row) for row in table.rows)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
