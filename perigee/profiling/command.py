"""`perigee profile`: measures a running cluster, fits the cost model, and writes the profile."""

import datetime
import logging
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict

import numpy as np
from rich.console import Console
from rich.table import Table

from perigee.output import STDOUT, check_writable, publish_json
from perigee.profiling.cluster import Cluster, Target, Worker, fetch
from perigee.profiling.config import ProfileConfig
from perigee.profiling.measure import Bench, Effort
from perigee.profiling.probe import Probe
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.fit import Fitted, Samples, fit
from perigee.scheduler.cost.profile_file import Origin, PartError, ProfileFile, write_profile

logger = logging.getLogger(__name__)


async def run(config: ProfileConfig) -> None:
    """Raises ProfilingError if the cluster cannot be measured, ConfigurationError for files that cannot be written."""
    check_writable(output=config.output, json=config.json_file)
    api_key = config.api_key.get_secret_value() if config.api_key else ""
    profile, samples = await profiled(await fetch(Target(config.url, api_key)), config)
    write_profile(config.output, profile)
    logger.info("profile written path=%s %s", config.output, profile.origin)
    _publish(profile, samples, config)


async def profiled(cluster: Cluster, config: ProfileConfig) -> tuple[ProfileFile, Samples]:
    """The profile of a cluster, and what it was fitted to. Raises ProfilingError, and InvalidProfile for what does not
    make one."""
    samples = await _measured(cluster, config)
    fitted = fit(samples, CostProfile())
    return ProfileFile.of(fitted.profile, _origin(cluster, fitted, config)), samples


async def _measured(cluster: Cluster, config: ProfileConfig) -> Samples:
    """One worker at a time, so that none disturbs another; but for decoding beside prefill, where that is asked for."""
    bench = Bench(Effort(config.max_tokens, config.repeats, config.seconds), np.random.default_rng(config.seed))
    async with AsyncExitStack() as attached:
        run_id = secrets.token_hex(4)
        probes = [
            await attached.enter_async_context(Probe.attached(worker, cluster.model, config.access, run_id))
            for worker in cluster.workers
        ]
        prefillers = [probe for probe in probes if probe.worker.prefills]
        for probe in prefillers:
            logger.info("measuring prefill worker=%s", probe.worker.id)
            await bench.measure_prefill(probe)
            if source := _elsewhere(probe.worker, prefillers):
                await bench.measure_pull(probe, source)
        for probe in probes:
            if probe.worker.decodes:
                logger.info("measuring decode worker=%s", probe.worker.id)
                async with bench.occupied(_beside(probe, prefillers) if config.busy else []):
                    await bench.measure_steps(probe, _nearest(probe.worker, prefillers))
    return bench.samples


def _elsewhere(worker: Worker, prefillers: Sequence[Probe]) -> Probe | None:
    """A prefill worker at another store node."""
    return next((probe for probe in prefillers if probe.worker.store != worker.store), None)


def _beside(probe: Probe, prefillers: Sequence[Probe]) -> list[Probe]:
    """The other workers of its host that compute prompts."""
    return [other for other in prefillers if other is not probe and other.worker.host == probe.worker.host]


def _nearest(worker: Worker, prefillers: Sequence[Probe]) -> Probe:
    """A prefill worker, at the same store node if there is one."""
    return min(prefillers, key=lambda probe: probe.worker.store != worker.store)


def _origin(cluster: Cluster, fitted: Fitted, config: ProfileConfig) -> Origin:
    hosts = sorted({worker.host for worker in cluster.workers})
    unmeasured = ("transfer: not measured, all workers are at one store node",)
    return Origin(
        method="measured",
        model=cluster.model.name,
        machine=config.machine or ", ".join(hosts),
        date=config.date or datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        residuals={name: PartError(**asdict(residual)) for name, residual in fitted.residuals.items()},
        notes=[] if "transfer" in fitted.residuals else list(unmeasured),
    )


def _publish(profile: ProfileFile, samples: Samples, config: ProfileConfig) -> None:
    """Tables on standard output, which makes way for JSON where that goes there."""
    console = Console(stderr=config.json_file == STDOUT)
    console.print(_coefficients(profile), _residuals(profile))
    publish_json({**profile.model_dump(), "samples": asdict(samples)}, config.json_file)


def _coefficients(profile: ProfileFile) -> Table:
    table = Table("coefficient", "value", title=f"cost profile of {profile.origin.model}")
    for name, value in profile.cost.items():
        table.add_row(name, f"{value:.4g}" if name == "step_expert_share" else _seconds(value))
    return table


def _residuals(profile: ProfileFile) -> Table:
    table = Table("fit", "samples", "p50 error", "p90 error", caption="\n".join(profile.origin.notes) or None)
    for name, error in profile.origin.residuals.items():
        table.add_row(name, str(error.samples), f"{error.p50:.1%}", f"{error.p90:.1%}")
    return table


def _seconds(value: float) -> str:
    """In the unit in which it is easy to read."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value / 1e-9:.4g} ns"
