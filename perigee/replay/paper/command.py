"""`perigee paper`: runs the experiments and lays ours beside what was published."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from perigee.output import STDOUT, check_writable, publish, publish_json
from perigee.plots.page import Section, page
from perigee.replay.paper import cache, capacity, overload, prefill
from perigee.replay.paper.entry import Entry
from perigee.replay.paper.lab import Lab
from perigee.replay.paper.tables import number, why

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
    html: Path | None = Field(None, description="write a page with tables and plots to this file")


def run(config: PaperConfig) -> int:
    """Raises ReplayError if there is no trace, ConfigurationError for a file that cannot be written."""
    check_writable(json=config.json_file, html=config.html)
    lab = Lab(config.trace or _trace(), config.limit)
    _run_all(lab)
    entries = {experiment.name: experiment.entries(lab) for experiment in EXPERIMENTS}
    every = [entry for some in entries.values() for entry in some]
    Console(stderr=config.json_file == STDOUT).print(_table(every))
    if config.html:
        sections = [experiment.section(lab, entries[experiment.name]) for experiment in EXPERIMENTS]
        publish(_page(sections), "html", config.html)
    publish_json({"experiments": [asdict(entry) | {"why": why(entry)} for entry in every]}, config.json_file, indent=2)
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
