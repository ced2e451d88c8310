"""`perigee bench conductor`: how fast the scheduler decides in a large cluster, and what it takes to know one."""

from collections.abc import Collection

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from perigee.bench.conductor_load import BlockFigures, DecisionFigures, Scene
from perigee.bench.errors import BenchError
from perigee.output import STDOUT, check_writable, publish_json
from perigee.scheduler.policies import ADMISSIONS, PLACEMENTS, make_policies

_SHORT_BLOCKS, _LONG_BLOCKS = 24, 256

_LABELS = {
    "decisions_per_s": f"decisions a second, prompts of {_SHORT_BLOCKS} blocks",
    "decision_p50_ms": f"one decision, prompt of {_LONG_BLOCKS} blocks, median ms",
    "decision_p99_ms": f"one decision, prompt of {_LONG_BLOCKS} blocks, p99 ms",
    "requests_per_s": f"whole requests a second, prompts of {_SHORT_BLOCKS} blocks",
    "block_events_per_s": "block events a second",
    "bytes_per_block": "bytes of memory a block",
}


class ConductorBenchConfig(BaseModel):
    """Tells a Conductor of many workers and blocks, then asks it where prompts are to run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(
        default=1000, ge=2, description="half for prefill and half for decode, each on a host of its own"
    )
    blocks: int = Field(default=1_000_000, gt=0, description="KVCache blocks that are known to be somewhere")
    decisions: int = Field(default=10_000, ge=10, description="prompts of 24 blocks to place; a tenth as many of 256")
    placement: str = Field(default="perigee", description="policy that places prompts")
    admission: str = Field(default="perigee", description="policy that admits prompts")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


def run(config: ConductorBenchConfig) -> int:
    """Measures and shows the results. Raises BenchError for a policy that is not known."""
    check_writable(json=config.json_file)
    _check("--placement", config.placement, PLACEMENTS)
    _check("--admission", config.admission, ADMISSIONS)
    scene = Scene(config.workers, make_policies(config.placement, config.admission))
    blocks = scene.fill(config.blocks)
    short = scene.decide(_SHORT_BLOCKS, config.decisions)
    figures = _figures(blocks, short, scene.decide(_LONG_BLOCKS, config.decisions // 10))
    if config.json_file != STDOUT:
        Console().print(_table(config, figures))
    publish_json(figures, config.json_file)
    return 0


def _check(flag: str, name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        raise BenchError(f"{flag}: {name!r} given, allowed are {', '.join(allowed)}")


def _figures(blocks: BlockFigures, short: DecisionFigures, long: DecisionFigures) -> dict[str, float]:
    return {
        "decision_p99_ms": round(1e3 * long.quantile_s(0.99), 4),
        "decision_p50_ms": round(1e3 * long.quantile_s(0.5), 4),
        "decisions_per_s": round(short.per_s, 1),
        "requests_per_s": round(1 / (1 / short.per_s + short.later_s), 1),
        "block_events_per_s": round(blocks.events_per_s, 1),
        "bytes_per_block": round(blocks.bytes_per_block, 1),
    }


def _table(config: ConductorBenchConfig, figures: dict[str, float]) -> Table:
    table = Table(title=f"{config.workers} workers, {config.blocks} blocks; {config.placement}, {config.admission}")
    table.add_column("")
    table.add_column("perigee", justify="right")
    for key, label in _LABELS.items():
        table.add_row(label, f"{figures[key]:,.4g}" if figures[key] < 100 else f"{figures[key]:,.0f}")
    return table
