"""`perigee bench store`: how fast blocks move, each way beside what the machine can do at the most."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from perigee.bench.machine import describe
from perigee.bench.store_local import lookup_keys_per_s, measure_local
from perigee.bench.store_ssd import measure_ssd
from perigee.bench.store_transfer import measure_pull
from perigee.output import STDOUT, check_writable, publish_json


class StoreBenchConfig(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_bytes: tuple[ByteSize, ...] = Field(
        default=(ByteSize(2 << 20), ByteSize(128 << 10)),
        min_length=1,
        description="sizes of blocks; the ratios are those of the first",
    )
    total_bytes: ByteSize = Field(
        default=ByteSize(256 << 20), ge=32 << 20, description="what each round moves, such as 256MiB"
    )
    repeats: int = Field(default=5, ge=1, description="rounds, ours and the limit in turn; the best counts")
    ssd_folder: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir()), description="folder on the disk to measure"
    )
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


def run(config: StoreBenchConfig) -> int:
    """Measures, prints a table, and writes JSON if asked to."""
    check_writable(json=config.json_file)
    sizes = {str(int(size)): _measure(config, size) for size in config.block_bytes}
    ratios = {size: _ratios(figures) for size, figures in sizes.items()}
    first = str(int(config.block_bytes[0]))
    results: dict[str, Any] = {
        "ratio": ratios[first],
        "lookup_keys_per_s": lookup_keys_per_s(),
        "socket_lookup_keys_per_s": sizes[first]["local"]["socket_keys"],
        "ratio_by_block_bytes": ratios,
        "gb_per_s_by_block_bytes": sizes,
        "machine": describe(),
    }
    if config.json_file != STDOUT:
        _print(results)
    publish_json(results, config.json_file)
    return 0


def _measure(config: StoreBenchConfig, block_bytes: int) -> dict[str, dict[str, Any]]:
    total, repeats = config.total_bytes, config.repeats
    return {
        "local": asdict(measure_local(block_bytes, total_bytes=total, repeats=repeats)),
        "transfer": asdict(measure_pull(block_bytes, total_bytes=total, rounds=repeats)),
        "ssd": measure_ssd(config.ssd_folder, block_bytes, total_bytes=2 * total, repeats=repeats),
    }


def _ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """None where there was nothing to compare with."""
    local, transfer, ssd = figures["local"], figures["transfer"], figures["ssd"]
    return {
        "local_read": local["read"] / local["memcpy"],
        "put": local["put"] / local["memcpy"],
        "pull_vs_socket": transfer["pull"] / transfer["bare_socket"],
        "pull_vs_mooncake": transfer["pull"] / transfer["mooncake"] if transfer["mooncake"] else None,
        "ssd_read": ssd["read"] / ssd["bare_read"],
        "ssd_write": ssd["write"] / ssd["bare_write"],
    }


_ROWS = {
    "local_read": ("local", "read", "memcpy"),
    "put": ("local", "put", "memcpy"),
    "pull_vs_socket": ("transfer", "pull", "bare_socket"),
    "pull_vs_mooncake": ("transfer", "pull", "mooncake"),
    "ssd_read": ("ssd", "read", "bare_read"),
    "ssd_write": ("ssd", "write", "bare_write"),
}


def _print(results: dict[str, Any]) -> None:
    table = Table(title="store, GB/s")
    for column in ("block", "", "perigee", "beside", "", "ratio"):
        table.add_column(column, justify="right")
    for size, figures in results["gb_per_s_by_block_bytes"].items():
        for name, (group, ours, beside) in _ROWS.items():
            if ratio := results["ratio_by_block_bytes"][size][name]:
                row = figures[group]
                table.add_row(
                    f"{int(size) >> 10} KiB", ours, f"{row[ours]:.2f}", beside, f"{row[beside]:.2f}", f"{ratio:.2f}"
                )
    console = Console()
    console.print(table)
    console.print(f"lookups: {results['lookup_keys_per_s']:,.0f} keys/s in the index, ", end="")
    console.print(f"{results['socket_lookup_keys_per_s']:,.0f} keys/s through a worker's socket")
