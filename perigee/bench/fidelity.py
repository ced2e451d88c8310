"""`perigee bench fidelity TRACE`: the simulator beside a cluster that runs here, on the same requests.

The cluster is measured first, as `perigee profile --busy` does, and the profile is all the simulator is told of it.
Both then serve the trace at the speed at which prefilling it keeps one worker busy for a given share of the time.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from perigee.bench.errors import BenchError
from perigee.bench.pinned import pin, running
from perigee.output import STDOUT, check_writable, publish_json
from perigee.profiling.cluster import Cluster, Target, fetch
from perigee.profiling.command import profiled
from perigee.profiling.config import ProfileConfig
from perigee.replay.metrics import Distribution, Report, Slo, summarize
from perigee.replay.simulator.cluster import Cluster as SimulatedCluster
from perigee.replay.simulator.cluster import NodeGroup
from perigee.replay.simulator.simulation import simulate
from perigee.replay.trace import TraceRequest, read_trace, scale, speed_up
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.profile_file import ProfileFile, write_profile
from perigee.workers.model.checkpoint import DEFAULT_MODEL

_CHUNK_TOKENS = 2048


class FidelityBenchConfig(BaseModel, frozen=True, extra="forbid"):
    """A trace on a cluster of one prefill and one decode worker, a thread and a core each, and on its simulation."""

    trace: Path = Field(description="request trace: Mooncake's JSON lines or Azure's CSV")
    model: str = Field(default=DEFAULT_MODEL, description="what the cluster serves")
    limit: int = Field(default=40, ge=2, description="only the first so many requests")
    length_scale: float = Field(default=0.0625, gt=0, allow_inf_nan=False, description="factor on all lengths")
    utilization: float = Field(
        default=0.4, gt=0, lt=1, description="share of the time for which prefilling without a cache would take"
    )
    repeats: int = Field(default=3, ge=1, description="how often the trace is replayed live")
    profile_s: float = Field(default=20.0, gt=0, description="time to measure each worker")
    profile_tokens: int = Field(default=2048, ge=64, description="longest prompt to measure")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared, in seconds. TBT is each request's mean: of twenty tokens the slowest is the handover."""

    ttft_mean_s: float
    ttft_p90_s: float
    tbt_mean_s: float
    tbt_p90_s: float

    @classmethod
    def of(cls, ttft: Distribution, tbt: Distribution) -> "Figures":
        """Raises BenchError where nothing was measured."""
        values = (ttft.mean, ttft.p90, tbt.mean, tbt.p90)
        if None in values:
            raise BenchError("limit: no request had two tokens; allowed is a trace in which some have")
        return cls(*(value or 0.0 for value in values))


NAMES = tuple(Figures.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The live runs and the simulated one. `pinned` says whether each worker had a core of its own."""

    profile: ProfileFile
    speed: float
    pinned: bool
    live: Sequence[Figures]
    simulated: Figures

    def ratios(self, name: str) -> list[float]:
        """Simulated over live, in each run, the smallest first."""
        return sorted(getattr(self.simulated, name) / getattr(live, name) for live in self.live)

    def as_json(self) -> dict[str, Any]:
        return {
            "ratio": {name: median(self.ratios(name)) for name in NAMES},
            "ratio_spread": {name: [self.ratios(name)[0], self.ratios(name)[-1]] for name in NAMES},
            "simulated": {name: getattr(self.simulated, name) for name in NAMES},
            "live": [{name: getattr(live, name) for name in NAMES} for live in self.live],
            "speed": self.speed,
            "pinned": self.pinned,
            "profile": self.profile.model_dump(),
        }

    def table(self) -> Table:
        table = Table("", "live", "simulated", "ratio", "of single runs", title="simulator beside a live cluster")
        for name in NAMES:
            live_s = median(getattr(live, name) for live in self.live)
            ratios = self.ratios(name)
            table.add_row(
                name.removesuffix("_s"),
                f"{live_s * 1000:.1f} ms",
                f"{getattr(self.simulated, name) * 1000:.1f} ms",
                f"{median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            )
        return table


async def run(config: FidelityBenchConfig) -> None:
    """Raises BenchError, ReplayError or ProfilingError."""
    check_writable(json=config.json_file)
    trace = scale(read_trace(config.trace)[: config.limit], config.length_scale)
    with tempfile.TemporaryDirectory(prefix="perigee-fidelity-") as folder:
        comparison = await _compare(config, trace, Path(folder))
    if config.json_file != STDOUT:
        Console().print(comparison.table())
    publish_json(comparison.as_json(), config.json_file)


async def _compare(config: FidelityBenchConfig, trace: Sequence[TraceRequest], folder: Path) -> Comparison:
    flags = (f"--max-batched-tokens={_CHUNK_TOKENS}",)
    async with running(config.model, flags, folder / "cluster.log") as started:
        cluster = await fetch(Target(started.url))
        pinned = pin([worker.pid for worker in cluster.workers])
        asked = ProfileConfig(url=started.url, seconds=config.profile_s, max_tokens=config.profile_tokens, busy=True)
        profile, _ = await profiled(cluster, asked)
        speed = run_speed(trace, profile.profile, config.utilization)
        live = [await _replayed(config, started.url, speed, folder, turn) for turn in range(config.repeats)]
    write_profile(folder / "profile.yaml", profile)
    simulated = simulate(speed_up(trace, speed), _simulated(cluster, folder / "profile.yaml"))
    report = summarize(simulated.records, Slo())
    return Comparison(profile, speed, pinned, live, _figures(report))


def run_speed(trace: Sequence[TraceRequest], profile: CostProfile, utilization: float) -> float:
    """The speed at which the prompts of the trace, without a cache, take that share of its length.

    Raises BenchError if it has none.
    """
    length_s = trace[-1].arrival_s - trace[0].arrival_s
    if length_s <= 0:
        raise BenchError(f"trace: its {len(trace)} requests all come at once, allowed are those that come over time")
    return utilization * length_s / sum(profile.prefill_s(request.input_tokens, 0) for request in trace)


async def _replayed(config: FidelityBenchConfig, url: str, speed: float, folder: Path, turn: int) -> Figures:
    """One live run, with prompts that no earlier one had. Raises BenchError if a request failed."""
    report = folder / f"live-{turn}.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perigee", "replay", str(config.trace), f"--url={url}", f"--json={report}"),
        *(f"--limit={config.limit}", f"--length-scale={config.length_scale}", f"--speed={speed}", f"--seed={turn}"),
        "--no-observe",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        raise BenchError(f"the live run failed: {said.decode(errors='replace').strip().splitlines()[-1:]}")
    read = json.loads(report.read_text(encoding="utf-8"))
    return Figures.of(Distribution(**read["ttft_s"]), Distribution(**read["mean_tbt_s"]))


def _simulated(cluster: Cluster, profile: Path) -> SimulatedCluster:
    """The same cluster, as its server and its profile tell of it."""
    block_tokens, worker = cluster.model.block_tokens, cluster.workers[0].load
    group = NodeGroup(
        roles=("prefill", "decode"),
        count=1,
        capacity_tokens=cluster.stores[0].load.num_slots * block_tokens,
        kv_tokens=worker.total_pages * block_tokens,
        max_sequences=worker.max_sequences,
        chunk_tokens=_CHUNK_TOKENS,
    )
    return SimulatedCluster(
        name=cluster.model.name,
        profile=profile,
        nodes=(group,),
        block_tokens=block_tokens,
        max_context=cluster.model.max_context,
    )


def _figures(report: Report) -> Figures:
    return Figures.of(report.ttft_s, report.mean_tbt_s)
