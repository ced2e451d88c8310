"""`perigee simulate`: a trace on a simulated cluster."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from perigee.output import check_writable
from perigee.replay.metrics import RequestRecord, Slo, summarize
from perigee.replay.report import ReplayProgress, Run, write_run
from perigee.replay.simulator.cluster import Cluster, changed, read_cluster
from perigee.replay.simulator.simulation import Simulation
from perigee.replay.trace import read_trace, scale, speed_up

logger = logging.getLogger(__name__)


class SimulateConfig(BaseModel, frozen=True, extra="forbid"):
    """A request trace on a simulated cluster: the real scheduler, batcher and store, in virtual time."""

    trace: Path = Field(description="request trace: Mooncake's JSON lines or Azure's CSV")
    cluster: Path = Field(description="the cluster's YAML file, such as those in deploy/clusters")
    placement: str | None = Field(default=None, description="placement policy [default: the cluster's]")
    admission: str | None = Field(default=None, description="admission policy [default: the cluster's]")
    balance: str | None = Field(default=None, description="balance policy [default: the cluster's]")
    shadow: str | None = Field(
        default=None,
        description="policies to ask as well, without obeying them, such as placement=random,admission=early"
        " [default: the cluster's]",
    )
    limit: int | None = Field(default=None, ge=1, description="only the first so many requests")
    speed: float = Field(default=1.0, ge=1e-6, le=1e6, description="how many times as fast requests arrive")
    length_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="factor on all lengths")
    slo_ttft_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="longest time to first token, in seconds [default: the cluster's]",
    )
    slo_tbt_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="longest time between tokens, in seconds [default: the cluster's]",
    )
    seed: int | None = Field(default=None, description="of what is drawn by lot [default: the cluster's]")
    json_file: str | None = Field(
        default=None, description="write the report as JSON to this file; - is standard output"
    )
    html: Path | None = Field(default=None, description="write the report as a page with plots to this file")


def run(config: SimulateConfig) -> int:
    """Simulates and reports; the exit status is 1 if a request failed. Raises ReplayError or InvalidProfile, and
    ConfigurationError for a file that cannot be written.
    """
    check_writable(json=config.json_file, html=config.html)
    cluster = _cluster(config)
    trace = speed_up(scale(read_trace(config.trace)[: config.limit], config.length_scale), config.speed)
    logger.info("simulation started cluster=%s requests=%d", cluster.name, len(trace))
    with ReplayProgress(len(trace), "simulate") as progress, _no_garbage_collection():

        def on_record(record: RequestRecord) -> None:
            progress.advance(record.outcome)

        simulated = Simulation(cluster, on_record).run(trace)
    report = summarize(simulated.records, Slo(cluster.slo_ttft_s, cluster.slo_tbt_s))
    about = {
        "trace": str(config.trace),
        "cluster": cluster.name,
        "model": cluster.model or str(cluster.profile),
        "placement": cluster.placement,
        "admission": cluster.admission,
        "balance": cluster.balance,
        "speed": f"{config.speed:g}",
    }
    title = f"Simulation of {config.trace.name} on {cluster.name}"
    ran = Run(title, about, report, simulated.records, simulated.samples, simulated.shadow)
    write_run(ran, config.json_file, config.html)
    logger.info("simulation ended requests=%d virtual_s=%.1f", report.requests, report.duration_s)
    return 1 if report.failed else 0


def _cluster(config: SimulateConfig) -> Cluster:
    """The file's cluster, with what flags say otherwise."""
    said: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("placement", "admission", "balance", "shadow", "slo_ttft_s", "slo_tbt_s", "seed")
        if getattr(config, name) is not None
    }
    return changed(read_cluster(config.cluster), **said)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What a simulation lets go of is freed by counting references; to look for cycles takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
