"""`perigee bench engine`: prefill and decode of the engine alone, beside transformers and the machine's limit."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from perigee.bench.machine import describe, matmul_flops_per_s, memory_bytes_per_s
from perigee.bench.workload import Figures, best, measure_engine
from perigee.workers.config import WorkerConfig
from perigee.workers.loading import load_engine
from perigee.workers.model.checkpoint import resolve
from perigee.workers.model.config import ModelConfig, load_config


class EngineBenchConfig(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default="smollm2-135m-instruct", description="checkpoint, as for `perigee up`")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of weights and KVCache")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")
    prefill: tuple[int, ...] = Field(default=(1000,), description="prompt lengths in tokens")
    decode: tuple[int, ...] = Field(default=(1, 8), description="numbers of concurrent streams")
    repeats: int = Field(default=3, ge=1, description="rounds, ours and the peer in turn; the best counts")
    peer: Literal["transformers", "none"] = Field(default="transformers", description="what to measure beside")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


def run(config: EngineBenchConfig) -> int:
    """Measures, prints a table, and writes JSON if asked to."""
    if config.threads:
        torch.set_num_threads(config.threads)
    directory = resolve(config.model, config.dtype)
    model = load_config(directory)
    has_peer = config.peer != "none" and importlib.util.find_spec(config.peer) is not None
    ours, peer = _rounds(config, directory, model, has_peer)
    results: dict[str, Any] = {**ours.as_json(), "limit": _limit(config, model).as_json(), "machine": describe()}
    if peer:
        results[config.peer] = peer.as_json()
    elif config.peer != "none":
        results["peer_missing"] = config.peer
        sys.stderr.write(f"perigee bench engine: {config.peer} is not installed, so it was not measured\n")
    if config.json_file == "-":
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
        return 0
    _print(results, config.peer)
    if config.json_file:
        Path(config.json_file).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _rounds(
    config: EngineBenchConfig, directory: Path, model: ModelConfig, has_peer: bool
) -> tuple[Figures, Figures | None]:
    """Ours and the peer's in turn, so that both see the machine's good and bad minutes."""
    longest = max((*config.prefill, 64 + 64)) + 64
    worker = WorkerConfig(
        id="bench",
        role="mixed",
        model=str(directory),
        store=Path("/nonexistent"),
        directory="",
        dtype=config.dtype,
        threads=config.threads,
        kv_tokens=longest * max(config.decode),
        max_sequences=max(config.decode),
    )
    engine = load_engine(directory, model, worker)
    ours: list[Figures] = []
    peers: list[Figures] = []
    for _ in range(config.repeats):
        ours.append(measure_engine(engine, config.prefill, config.decode))
        if has_peer:
            peers.append(_measure_peer(config, directory))
    return best(ours), best(peers) if peers else None


def _measure_peer(config: EngineBenchConfig, directory: Path) -> Figures:
    """The peer in a process of its own, with as many threads."""
    job = {
        "model": str(directory),
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
        "prefill": config.prefill,
        "decode": config.decode,
    }
    command = [sys.executable, "-m", f"perigee.bench.peer_{config.peer}", json.dumps(job)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return Figures.from_json(json.loads(output.splitlines()[-1]))


def _limit(config: EngineBenchConfig, model: ModelConfig) -> Figures:
    """Prefill: the products' operations at the measured rate of a large product. Decode: the weights, read once a step
    at the measured memory bandwidth, whatever the number of streams, but no faster than the operations allow."""
    flops = matmul_flops_per_s(config.dtype)
    bandwidth = memory_bytes_per_s()
    element = 2 if config.dtype == "bfloat16" else 4
    step_s = model.num_step_weights * element / bandwidth
    compute_s = 2 * model.num_step_weights / flops
    return Figures(
        prefill={n: n / (model.prefill_flops(n) / flops) for n in config.prefill},
        decode={n: n / max(step_s, n * compute_s) for n in config.decode},
    )


def _print(results: dict[str, Any], peer: str) -> None:
    table = Table(title="engine, tokens/s")
    for column in ("", "perigee", peer, "ratio", "limit", "of limit"):
        table.add_column(column, justify="right")
    for phase in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        for size, ours in results[phase].items():
            theirs = results.get(peer, {}).get(phase, {}).get(size)
            limit = results["limit"][phase][size]
            ratio = [f"{theirs:.0f}", f"{ours / theirs:.2f}"] if theirs else ["", ""]
            unit = "tokens" if phase.startswith("prefill") else "streams"
            label = f"{phase.partition('_')[0]} {size} {unit}"
            table.add_row(label, f"{ours:.0f}", *ratio, f"{limit:.0f}", f"{ours / limit:.0%}")
    Console().print(table)
