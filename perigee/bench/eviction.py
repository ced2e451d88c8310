"""`perigee bench eviction TRACE`: the block hit ratio of each eviction policy, beside Belady's MIN."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from perigee.bench.errors import BenchError
from perigee.bench.foresight import Foresight
from perigee.kvstore.evict import PolicyName, make_policy
from perigee.output import STDOUT, check_writable, publish_json
from perigee.replay.cache_walk import Walk, prompts_of, walk
from perigee.replay.trace import read_trace


class EvictionBenchConfig(BaseModel):
    """Walks a request trace through the index of a store node, once with each eviction policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trace: Path = Field(description="request trace whose prompts name their blocks: JSON lines with hash_ids")
    capacity_tokens: int = Field(default=3_000_000, gt=0, description="tokens that the arena holds")
    block_tokens: int = Field(default=512, gt=0, description="tokens of a block; must divide the trace's 512")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


def run(config: EvictionBenchConfig) -> int:
    """Walks and shows the results. Raises TraceError; BenchError if the arena would hold no block, or none returns."""
    check_writable(json=config.json_file)
    num_slots = config.capacity_tokens // config.block_tokens
    if not num_slots:
        raise BenchError(
            f"--capacity-tokens: {config.capacity_tokens} given, allowed is a block of {config.block_tokens} or more"
        )
    walks = _walks(config, num_slots)
    if config.json_file != STDOUT:
        Console().print(_table(config, num_slots, walks))
    publish_json(_as_json(config, num_slots, walks), config.json_file)
    return 0


def _walks(config: EvictionBenchConfig, num_slots: int) -> dict[str, Walk]:
    """By name of the policy."""
    prompts = prompts_of(read_trace(config.trace), config.block_tokens)
    if sum(map(len, prompts)) == len({key for prompt in prompts for key in prompt}):
        raise BenchError(
            f"TRACE: {config.trace}: no block of it returns;"
            " allowed are traces whose prompts name their blocks by hash_ids"
        )
    names: tuple[PolicyName, ...] = get_args(PolicyName)
    walks = {str(name): walk(prompts, num_slots, make_policy(name, num_slots)) for name in names}
    return {**walks, "min": walk(prompts, num_slots, Foresight(prompts, num_slots))}


def _as_json(config: EvictionBenchConfig, num_slots: int, walks: dict[str, Walk]) -> dict[str, Any]:
    return {
        "hit_ratio": {name: round(each.hit_ratio, 6) for name, each in walks.items()},
        "us_per_block": {name: round(each.us_per_block, 3) for name, each in walks.items()},
        "blocks": walks["min"].num_blocks,
        "capacity_blocks": num_slots,
        "capacity_tokens": config.capacity_tokens,
        "block_tokens": config.block_tokens,
    }


def _table(config: EvictionBenchConfig, num_slots: int, walks: dict[str, Walk]) -> Table:
    table = Table(title=f"{config.trace.name}, {walks['min'].num_blocks} blocks through an arena of {num_slots}")
    for column in ("policy", "hit ratio", "of MIN's", "µs per block, index included"):
        table.add_column(column, justify="right")
    best = walks["min"].num_hits
    for name, each in walks.items():
        of_min = f"{each.num_hits / best:.0%}" if best else ""
        table.add_row(name, f"{each.hit_ratio:.4f}", of_min, f"{each.us_per_block:.1f}")
    return table
