"""One HTML file with tables and plots, without a script or anything from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from perigee.plots.svg import STYLE, Plot, inline

_STYLE = """
  :root { color-scheme: light dark }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 1600px; margin: 2rem auto; padding: 0 1rem }
  h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
  h1, h2, p { overflow-wrap: anywhere } p { max-width: 60rem } .note { font-size: .9rem; margin: .3rem 0 }
  .tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; margin: .7rem 0 }
  .tables > div { max-width: 100% } .table { overflow-x: auto } table { border-collapse: collapse }
  th, td { padding: .2rem .8rem; text-align: right; vertical-align: top } td:not(.text) { white-space: nowrap }
  .text, th:first-child { text-align: left } td.text { white-space: pre-wrap } tr { border-bottom: 1px solid #8884 }
  .plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 1rem }
  .plots svg { width: 100%; height: auto }
  @media (max-width: 600px) { body { margin: 1rem auto; padding: 0 .7rem } th, td { padding: .2rem .4rem } }
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells as there are in `head`, which may be empty, and `notes` below them. Columns that are mostly
    figures stand to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


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
    if section.tables:
        parts += ['<div class="tables">', *map(_table, section.tables), "</div>"]
    if section.plots:
        parts += ['<div class="plots">', *(inline(plot) for plot in section.plots), "</div>"]
    return "\n".join(parts)


def _table(table: Table) -> str:
    columns = enumerate(zip(*table.rows, strict=True))
    are_text = [index == 0 or sum(map(_is_figure, cells)) <= len(cells) / 2 for index, cells in columns]
    head = _row("th", table.head, are_text) if table.head else ""
    body = "".join(_row("td", row, are_text) for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return f'<div><div class="table"><table>{head}{body}</table></div>{notes}</div>'


def _is_figure(cell: str) -> bool:
    return cell == "–" or cell.lstrip("-+").startswith(tuple("0123456789"))


def _row(tag: str, cells: Sequence[str], are_text: Sequence[bool]) -> str:
    kinds = [' class="text"' if is_text else "" for is_text in are_text] or [""] * len(cells)
    marked = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{''.join(marked)}</tr>"
