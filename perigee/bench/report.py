"""The results of `perigee bench engine`, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from perigee.bench.machine import MachineRates
from perigee.bench.workload import Figures
from perigee.output import STDOUT, publish_json


@dataclass(frozen=True, slots=True)
class Report:
    """Ours, the machine's limit, and the peers' by name, at the same sizes. `notes` say what was left out, and why."""

    ours: Figures
    limit: Figures
    peers: Mapping[str, Figures]
    rates: MachineRates
    machine: Mapping[str, str | int]
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Ours, and under the same keys the limit, the fraction that ours reaches of it, each peer and ours over it."""
        return {
            **self.ours.as_json(),
            "limit": self.limit.as_json(),
            "fraction_of_limit": ratios(self.ours, self.limit).as_json(digits=3),
            "peers": {name: self._peer_json(figures) for name, figures in self.peers.items()},
            "machine": {**self.machine, **self.rates.as_json()},
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        table = Table(title="engine, tokens/s", caption="\n".join(self.notes) or None)
        peers = [column for name in self.peers for column in (name, "ratio")]
        for column in ("", "perigee", "limit", "of limit", *peers):
            table.add_column(column, justify="right")
        for phase, label in LABELS.items():
            for size in self.ours.phase(phase):
                table.add_row(label.format(size), *self._cells(phase, size))
        return table

    def _peer_json(self, figures: Figures) -> dict[str, Any]:
        return {**figures.as_json(), "ratio": ratios(self.ours, figures).as_json(digits=2)}

    def _cells(self, phase: str, size: int) -> list[str]:
        rate, limit = self.ours.phase(phase)[size], self.limit.phase(phase)[size]
        cells = [f"{rate:.0f}", f"{limit:.0f}", f"{rate / limit:.0%}"]
        for figures in self.peers.values():
            peer = figures.phase(phase)[size]
            cells += [f"{peer:.0f}", f"{rate / peer:.2f}"]
        return cells


LABELS = {
    "prefill": "prefill {} tokens",
    "decode": "decode {} streams",
    "decode_with_prompts": "decode {} streams, prompts included",
}


def ratios(over: Figures, under: Figures) -> Figures:
    """`over` / `under`, size by size."""
    return Figures.of_phases(lambda phase: {n: rate / under.phase(phase)[n] for n, rate in over.phase(phase).items()})


def publish(report: Report, json_file: str) -> None:
    """As JSON to standard output for `-`; otherwise as a table, and to the file if one is named."""
    if json_file != STDOUT:
        Console().print(report.table())
    publish_json(report.as_json(), json_file)
