"""Open-loop load on a live endpoint: requests go out at the trace's own times, whatever became of earlier ones."""

import asyncio
import logging
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext

import aiohttp

from perigee.output import check_writable
from perigee.replay.client import Clock, CompletionClient, Model, Params
from perigee.replay.config import ReplayConfig
from perigee.replay.metrics import Report, RequestRecord, Slo, summarize
from perigee.replay.observer import Observer
from perigee.replay.prompts import CONSERVATIVE_VOCAB_SIZE, Prompts, ordinary_tokens
from perigee.replay.report import ReplayProgress, Run, write_run
from perigee.replay.series import samples_of
from perigee.replay.trace import TraceRequest, read_trace, scale, speed_up

logger = logging.getLogger(__name__)

# Below what servers commonly keep an idle connection for (5 s), so that none is taken that is just being closed.
_KEEPALIVE_S = 2.0


async def run(config: ReplayConfig) -> int:
    """Replay a trace and report; the exit status is 1 if a request failed. Cancelled, it reports what there is so far.

    Raises ReplayError if the trace cannot be used or the endpoint does not answer.
    """
    check_writable(json=config.json_file, html=config.html)
    trace = load_trace(config)
    async with _session(config) as session:
        client = CompletionClient(session, config.url)
        model = await client.model(config.model)
        prompts = Prompts(trace, ordinary_tokens(_vocab_size(config, model)), config.seed)
        observer = await Observer.of(session, config.url) if config.observe else None
        return await _replay(trace, prompts, client, Params(model.id, config.temperature), config, observer)


def load_trace(config: ReplayConfig) -> tuple[TraceRequest, ...]:
    """The part of the trace that is asked for, at the length and speed asked for. Raises TraceError."""
    trace = read_trace(config.trace)[: config.limit]
    return speed_up(scale(trace, config.length_scale), config.speed)


async def send_all(
    trace: Iterable[TraceRequest],
    prompts: Prompts,
    client: CompletionClient,
    params: Params,
    on_record: Callable[[RequestRecord], None],
    clock: Clock,
) -> None:
    """Send every request when it is due, and return when all have ended; each ends with one call of `on_record`."""

    async def complete(body: bytes, due_s: float) -> None:
        on_record(await client.complete(body, due_s, clock))

    async with asyncio.TaskGroup() as requests:
        for request in trace:
            # Made before the wait, so that making it delays the request as little as can be.
            body = params.body(prompts.token_ids(request), request.output_tokens)
            await asyncio.sleep(max(request.arrival_s - clock(), 0))
            requests.create_task(complete(body, request.arrival_s))


async def _replay(
    trace: tuple[TraceRequest, ...],
    prompts: Prompts,
    client: CompletionClient,
    params: Params,
    config: ReplayConfig,
    observer: Observer | None,
) -> int:
    logger.info("replay started url=%s model=%s requests=%d", config.url, params.model, len(trace))
    records = observer.records if observer else []
    ended = observer.ended if observer else records.append
    clock = _clock()
    try:
        with ReplayProgress(len(trace)) as progress:

            def on_record(record: RequestRecord) -> None:
                ended(record)
                progress.advance(record.outcome)

            async with observer.observing(clock) if observer else nullcontext():
                await send_all(trace, prompts, client, params, on_record, clock)
    finally:
        report = _report(len(trace), records, params, config, observer)
    return 1 if report.failed else 0


def _report(
    num_requests: int,
    records: Sequence[RequestRecord],
    params: Params,
    config: ReplayConfig,
    observer: Observer | None,
) -> Report:
    """Of what has ended so far."""
    slo = Slo(config.slo_ttft_s, config.slo_tbt_s)
    report = summarize(records, slo, unfinished=num_requests - len(records))
    samples = samples_of(records, slo, observer.states if observer else ())
    shadow = observer.shadow if observer else None
    replayed = Run(f"Replay of {config.trace.name}", _about(config, params), report, records, samples, shadow)
    write_run(replayed, config.json_file, config.html)
    logger.info("replay ended requests=%d unfinished=%d", report.requests, report.unfinished)
    return report


def _about(config: ReplayConfig, params: Params) -> dict[str, str]:
    return {"trace": str(config.trace), "endpoint": config.url, "model": params.model, "speed": f"{config.speed:g}"}


def _vocab_size(config: ReplayConfig, model: Model) -> int:
    return config.vocab_size or model.vocab_size or CONSERVATIVE_VOCAB_SIZE


def _clock() -> Clock:
    start_s = time.perf_counter()
    return lambda: time.perf_counter() - start_s


@asynccontextmanager
async def _session(config: ReplayConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit on connections: a client that waits for one would no longer be an open loop."""
    _raise_open_files_limit()
    key = config.api_key
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=config.timeout_s),
        headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield session


def _raise_open_files_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
