"""`perigee paper`: runs the experiments and lays ours beside what was published."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from perigee.plots.page import Section, page
from perigee.replay.paper import cache, capacity, overload, prefill
from perigee.replay.paper.entry import Entry
from perigee.replay.paper.lab import Lab
from perigee.replay.paper.tables import number, why
from perigee.replay.report import STDOUT, check_json_file

TRACE = Path("mooncake_conversation.jsonl")
PLACES = (Path(), Path("traces"), Path("../shared/traces"))

EXPERIMENTS = (
    capacity.capacity(),
    prefill.scheduling(),
    cache.capacity(),
    cache.sharing(),
    prefill.bandwidth(),
    capacity.split(),
    overload.overload(),
    overload.ours(),
)


class PaperConfig(BaseModel, frozen=True, extra="forbid"):
    """The Mooncake paper's experiments on simulated clusters, ours beside the published figures."""

    trace: Path | None = Field(
        None,
        description=f"Mooncake's open conversation trace [default: {TRACE} here, in traces/ or in ../shared/traces/]",
    )
    limit: int | None = Field(None, gt=0, description="only the first so many requests: quick, and not comparable")
    json_file: str | None = Field(None, description="write the figures as JSON to this file, - for standard output")
    html: str | None = Field(None, description="write a page with tables and plots to this file")


def run(config: PaperConfig) -> int:
    """Raises ReplayError if there is no trace, or a file cannot be written."""
    for file in (config.json_file, config.html):
        check_json_file(file)
    lab = Lab(config.trace or _trace(), config.limit)
    _run_all(lab)
    entries = {experiment.name: experiment.entries(lab) for experiment in EXPERIMENTS}
    every = [entry for some in entries.values() for entry in some]
    Console(stderr=config.json_file == STDOUT).print(_table(every))
    if config.html:
        sections = [experiment.section(lab, entries[experiment.name]) for experiment in EXPERIMENTS]
        Path(config.html).write_text(_page(sections), encoding="utf-8")
    _write_json(every, config.json_file)
    return 0


def _trace() -> Path:
    found = [place / TRACE for place in PLACES if (place / TRACE).exists()]
    return found[0] if found else TRACE  # whose absence the reader reports


def _run_all(lab: Lab) -> None:
    trials = list(dict.fromkeys(trial for experiment in EXPERIMENTS for trial in experiment.trials))
    console = Console(stderr=True)
    columns = (TextColumn("paper"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("paper", total=len(trials))
        lab.run(trials, lambda: progress.update(task, advance=1))


def _table(entries: Sequence[Entry]) -> Table:
    table = Table(Column("figure", no_wrap=True), "what", "unit", "paper", "ours")
    for entry in entries:
        table.add_row(entry.id, entry.what, entry.unit, number(entry.paper), number(entry.ours))
    return table


def _page(sections: Sequence[Section]) -> str:
    return page("The Mooncake paper's experiments, simulated", sections)


def _write_json(entries: Sequence[Entry], file: str | None) -> None:
    text = json.dumps({"experiments": [asdict(entry) | {"why": why(entry)} for entry in entries]}, indent=2) + "\n"
    if file == STDOUT:
        sys.stdout.write(text)
    elif file:
        Path(file).write_text(text, encoding="utf-8")
