"""The life of a choice: placed by the Conductor, computed by workers, and taken up again when one of them fails."""

import asyncio
import logging
import math
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from perigee.scheduler import scheduler_pb2 as pb
from perigee.server.conductor_client import ConductorClient, ConductorLost, Rejected, Talk
from perigee.server.config import ServerConfig
from perigee.server.errors import (
    ApiError,
    ContextLengthExceeded,
    GenerationFailed,
    Overloaded,
    TimedOut,
    Unavailable,
)
from perigee.server.job import Job, Output, Prediction, Progress, cached_by_tier
from perigee.server.leg import AttemptFailed, Leg
from perigee.server.metrics import Metrics
from perigee.server.worker_pool import WorkerPool
from perigee.workers.engine.sequence import FinishReason, Sequence
from perigee.workers.messages import DecodeJoined, PrefillDone, StepOutput

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0

T = TypeVar("T")


class Dispatcher:
    """Drives choices to their end. It holds no state of its own: each choice's is on the stack of `run`."""

    def __init__(self, conductor: ConductorClient, workers: WorkerPool, metrics: Metrics, config: ServerConfig) -> None:
        self._conductor = conductor
        self._workers = workers
        self._metrics = metrics
        self._config = config

    async def run(self, job: Job, output: Output, admitted: asyncio.Event) -> None:
        """Returns when `output` has all tokens. Cancelling it cancels the choice everywhere. Raises ApiError.

        Once `admitted` is set, for the request as a whole, the choice waits for room instead of being turned away.
        """
        progress = Progress(job, output)
        try:
            async with asyncio.timeout(job.arrived_s + self._config.request_timeout_s - time.monotonic()):
                await self._run(progress, Recovery(self._config, job.prompt.field, admitted))
        except TimeoutError:
            raise TimedOut(f"no answer within {self._config.request_timeout_s:g} s") from None

    async def _run(self, progress: Progress, recovery: "Recovery") -> None:
        while True:
            try:
                return await self._attempt(progress, progress.sequence(recovery.attempt))
            except AttemptFailed as failure:
                self._metrics.failed_attempts.labels(failure.code).inc()
                pause_s = recovery.after_failure(failure)
            except Rejected as rejected:
                pause_s = recovery.after_rejection(rejected.command)
            await asyncio.sleep(pause_s)

    async def _attempt(self, progress: Progress, sequence: Sequence) -> None:
        with self._conductor.open(sequence.ref) as talk:
            try:
                await self._carry_out(progress, sequence, talk, await self._placed(progress, sequence, talk))
            except AttemptFailed as failure:
                logger.warning(
                    "attempt failed ref=%s worker=%s code=%s tokens=%d message=%s",
                    sequence.ref, failure.worker_id, failure.code, progress.num_tokens, failure.message,
                )  # fmt: skip
                talk.failed(failure.worker_id, failure.code)
                raise
            except Rejected as rejected:
                logger.info("attempt rejected ref=%s message=%s", sequence.ref, rejected)
                raise
            except BaseException:
                logger.info("attempt cancelled ref=%s tokens=%d", sequence.ref, progress.num_tokens)
                talk.cancelled()
                raise
            logger.info("sequence finished ref=%s tokens=%d", sequence.ref, progress.num_tokens)
            talk.finished(progress.num_tokens, progress.mean_tbt_s, progress.max_tbt_s)

    async def _placed(self, progress: Progress, sequence: Sequence, talk: Talk) -> pb.Dispatch:
        """Where the Conductor wants the attempt to run; a Conductor that restarts meanwhile is asked again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.conductor_wait_s):
                while True:
                    await self._conductor.attached()
                    with suppress(ConductorLost):
                        return await talk.arrive(_arrival(progress, sequence))
        raise Unavailable("the Conductor does not answer")

    async def _carry_out(self, progress: Progress, sequence: Sequence, talk: Talk, plan: pb.Dispatch) -> None:
        ref = sequence.ref
        logger.info("sequence dispatched ref=%s prefill=%s decode=%s", ref, plan.prefill.id, plan.decode.id)
        with Leg(plan.prefill.id, (await self._workers.get(plan.prefill)).open(ref)) as prefill:
            is_coupled = plan.decode.id == plan.prefill.id
            prefill.start(sequence, plan.prefill_source, plan.rank, "mixed" if is_coupled else "prefill")
            if is_coupled or progress.remaining == 1:
                await self._coupled(progress, talk, prefill, plan)
            else:
                with Leg(plan.decode.id, (await self._workers.get(plan.decode)).open(ref)) as decode:
                    decode.prepare(sequence, plan.decode_source, plan.rank)
                    await self._disaggregated(progress, talk, prefill, decode, ref.attempt, plan)

    async def _coupled(self, progress: Progress, talk: Talk, worker: Leg, plan: pb.Dispatch) -> None:
        if not await self._first_token(progress, talk, await worker.expect(PrefillDone), plan):
            talk.joined()
            await self._decode(progress, worker)

    async def _disaggregated(
        self, progress: Progress, talk: Talk, prefill: Leg, decode: Leg, attempt: int, plan: pb.Dispatch
    ) -> None:
        # Where the output ends with the first token, leaving the legs cancels both: prefill's leases, decode's pages.
        done = await _unless_fails(prefill.expect(PrefillDone), decode)
        if not await self._first_token(progress, talk, done, plan):
            decode.start(progress.sequence(attempt), plan.decode_source, plan.rank, "decode")
            await _unless_fails(decode.expect(DecodeJoined), prefill)
            prefill.joined()
            talk.joined()
            await self._decode(progress, decode)

    async def _first_token(self, progress: Progress, talk: Talk, done: PrefillDone, plan: pb.Dispatch) -> bool:
        """Takes the first token once the Conductor lets the attempt proceed. Returns whether it was the last, too."""
        cached = cached_by_tier(done.cached_tokens_dram, done.cached_tokens_ssd, done.cached_tokens_remote)
        with suppress(TimeoutError):  # a Conductor that hangs holds up nothing that it has admitted
            async with asyncio.timeout(self._config.conductor_wait_s):
                await talk.prefill_done(_report(progress, done, sum(cached.values())))
        if progress.admit(sum(cached.values()), Prediction(plan.predicted_ttft_s, plan.predicted_tbt_s)):
            self._metrics.count_cached(cached)
        return self._add(progress, done)

    async def _decode(self, progress: Progress, worker: Leg) -> None:
        ended = False
        while not ended:
            step = await worker.expect(StepOutput)
            if step.index != progress.num_tokens:
                text = f"sent token {step.index} where token {progress.num_tokens} was due"
                raise AttemptFailed(worker.worker_id, "internal", text)
            ended = self._add(progress, step)
        if step.finish_reason is not FinishReason.NOT_FINISHED:
            worker.settle()

    def _add(self, progress: Progress, said: PrefillDone | StepOutput) -> bool:
        first = progress.num_tokens == 0
        gap_s, ended = progress.add(said.token, said.finish_reason, time.monotonic())
        (self._metrics.ttft if first else self._metrics.tbt).observe(gap_s)
        self._metrics.output_tokens.inc()
        return ended


class Recovery:
    """Decides, after a failure, whether and when to dispatch again."""

    def __init__(self, config: ServerConfig, prompt_field: str, admitted: asyncio.Event) -> None:
        self.attempt = 0
        self._config = config
        self._prompt_field = prompt_field
        self._admitted = admitted  # whether any choice of the request is
        self._failures = 0
        self._waiting_since_s: float | None = None  # since the last failure, or else since the first rejection

    def after_failure(self, failure: AttemptFailed) -> float:
        """Seconds to wait before the next attempt: none at first. Raises ApiError if there is to be none."""
        self.attempt += 1
        self._failures += 1
        self._waiting_since_s = time.monotonic()
        if failure.code == "invalid":  # only its size can be wrong: all else was checked when the request came
            raise ContextLengthExceeded(failure.message, param=self._prompt_field)
        if self._failures >= self._config.max_attempts:
            raise _exhausted(failure, self._failures)
        return 0.0 if self._failures == 1 else min(0.1 * 2 ** (self._failures - 2), _LONGEST_PAUSE_S)

    def after_rejection(self, reject: pb.Reject) -> float:
        """Seconds to wait before the next attempt. A new request is turned away, which raises ApiError; one that was
        admitted waits for room while its deadline allows, and for a failed worker to be replaced for a limited time.
        """
        self.attempt += 1
        if reject.reason == pb.Reject.TOO_LARGE or not self._may_wait(reject):
            raise _refusal(reject, self._prompt_field)
        return min(max(reject.retry_after_s, 0.05), _LONGEST_PAUSE_S)

    def _may_wait(self, reject: pb.Reject) -> bool:
        if self._admitted.is_set() and reject.reason == pb.Reject.OVERLOAD:
            return True
        if not self._admitted.is_set() and self._failures == 0:
            return False
        now_s = time.monotonic()
        self._waiting_since_s = self._waiting_since_s or now_s
        return now_s - self._waiting_since_s <= self._config.recovery_wait_s


async def _unless_fails(message: Coroutine[Any, Any, T], other: Leg) -> T:
    """Waits for one worker's message, or for the other worker, which has nothing to say meanwhile, to fail."""
    said = asyncio.ensure_future(message)
    failed = asyncio.ensure_future(other.fails())
    try:
        await asyncio.wait({said, failed}, return_when=asyncio.FIRST_COMPLETED)
        if not said.done():
            failed.result()
        return await said
    finally:
        said.cancel()
        failed.cancel()
        await asyncio.gather(said, failed, return_exceptions=True)


def _arrival(progress: Progress, sequence: Sequence) -> pb.RequestArrived:
    """Later attempts are not held to the TTFT that the first was promised: they are to go on as soon as they can."""
    job = progress.job
    return pb.RequestArrived(
        block_keys=sequence.block_keys,
        num_tokens=len(sequence.token_ids),
        max_tokens=progress.remaining,
        age_s=time.monotonic() - job.arrived_s,
        tenant=job.tenant,
        priority=job.priority,
        slo_ttft_s=0.0 if sequence.ref.attempt or math.isinf(job.slo.ttft_s) else job.slo.ttft_s,
        slo_tbt_s=0.0 if math.isinf(job.slo.tbt_s) else job.slo.tbt_s,
    )


def _report(progress: Progress, done: PrefillDone, cached_tokens: int) -> pb.PrefillDone:
    return pb.PrefillDone(
        cached_tokens=cached_tokens,
        queue_s=done.queue_s,
        load_s=done.load_s,
        compute_s=done.compute_s,
        ttft_s=time.monotonic() - progress.job.arrived_s,
        cached_ssd_tokens=done.cached_tokens_ssd,
        cached_remote_tokens=done.cached_tokens_remote,
    )


def _exhausted(last: AttemptFailed, failures: int) -> ApiError:
    text = f"{failures} attempts failed, the last one with: {last.code}"
    return Overloaded(text, _LONGEST_PAUSE_S) if last.code == "no_room" else GenerationFailed(text)


def _refusal(reject: pb.Reject, prompt_field: str) -> ApiError:
    match reject.reason:
        case pb.Reject.TOO_LARGE:
            return ContextLengthExceeded(reject.message, param=prompt_field)
        case pb.Reject.UNAVAILABLE:
            return Unavailable(reject.message, reject.retry_after_s)
        case _:
            return Overloaded(reject.message, reject.retry_after_s, reject.predicted_ttft_s, reject.predicted_tbt_s)
