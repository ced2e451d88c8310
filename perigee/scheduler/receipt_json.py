"""A receipt as a document: what `GET /requests/{id}/receipt` and the receipts' log show. Times are in seconds."""

import math

from perigee.scheduler.admission import Refusal
from perigee.scheduler.commands import Reject
from perigee.scheduler.events import Failed, Finished, PrefillDone
from perigee.scheduler.plan import DecodeEstimate, Plan, PrefillEstimate
from perigee.scheduler.receipts import Attempt, Receipt
from perigee.scheduler.shadow import Verdict

Json = dict[str, object]


def document(receipt: Receipt, unix_offset_s: float = 0.0) -> Json:
    """The whole receipt. `unix_offset_s` turns readings of the Conductor's clock into Unix time."""
    return {
        "request_id": receipt.request_id,
        "choice": receipt.choice,
        "tenant": receipt.tenant,
        "priority": receipt.priority,
        "slo": {"ttft_s": _bound(receipt.slo.ttft_s), "tbt_s": _bound(receipt.slo.tbt_s)},
        "max_tokens": receipt.max_tokens,
        "policies": {"placement": receipt.policies.placement, "admission": receipt.policies.admission},
        "outcome": receipt.outcome.value,
        "forgotten_attempts": receipt.forgotten_attempts,
        "attempts": [_attempt(attempt, unix_offset_s) for attempt in receipt.attempts],
    }


def _attempt(attempt: Attempt, offset_s: float) -> Json:
    return {
        "attempt": attempt.number,
        "at": attempt.at + offset_s,
        "age_s": attempt.age_s,
        "num_tokens": attempt.num_tokens,
        "plan": _plan(attempt.plan),
        "dispatched": attempt.dispatch is not None,
        "rank": attempt.dispatch.rank if attempt.dispatch else None,
        "rejection": _rejection(attempt),
        "shadow": _shadow(attempt.shadow),
        "actual": _actual(attempt, offset_s),
        "failure": _failure(attempt.failed),
        "outcome": attempt.outcome.value,
        "ended_at": _at(attempt.ended_at, offset_s),
    }


def _plan(plan: Plan | None) -> Json | None:
    if plan is None:
        return None
    return {
        "why": plan.why or _standing(plan),
        "predicted_ttft_s": plan.ttft_s,
        "predicted_tbt_s": plan.tbt_s,
        "prefill": _prefill(plan.prefill),
        "prefill_candidates": [_prefill(estimate) for estimate in plan.considered],
        "decode": _decode(plan.decode),
        "decode_source": plan.decode_source,
        "decode_candidates": [_decode(estimate) for estimate in plan.considered_decode],
    }


def _standing(plan: Plan) -> str:
    """Where a policy said nothing: how its choice of a prefill worker stands beside the others."""
    earliest = min(plan.considered, key=lambda estimate: estimate.seconds, default=plan.prefill)
    later_s = plan.prefill.seconds - earliest.seconds
    if later_s <= 0:
        return "the earliest first token of those considered"
    return f"a first token {later_s:.4f} s later than on {earliest.worker.id}, the earliest of those considered"


def _prefill(estimate: PrefillEstimate) -> Json:
    return {
        "worker": estimate.worker.id,
        "store": estimate.worker.store,
        "source": estimate.source,
        "ttft_s": estimate.seconds,
        "queue_s": estimate.queue_s,
        "transfer_s": estimate.transfer_s,
        "load_s": estimate.load_s,
        "compute_s": estimate.compute_s,
        "new_tokens": estimate.new_tokens,
        "prefix_tokens": {
            "dram": max(0, estimate.prefix_tokens - estimate.ssd_tokens - estimate.remote_tokens),
            "ssd": estimate.ssd_tokens,
            "remote": estimate.remote_tokens,
        },
    }


def _decode(estimate: DecodeEstimate) -> Json:
    return {"worker": estimate.worker.id, "store": estimate.worker.store, "tbt_s": estimate.seconds}


def _rejection(attempt: Attempt) -> Json | None:
    rejection = attempt.rejection
    if rejection is None:
        return None
    when = "arrival" if attempt.dispatch is None else "prefill_end"
    return {"when": when, **_why_not(rejection)}


def _why_not(refusal: Reject | Refusal) -> Json:
    return {
        "reason": refusal.reason.name.lower(),
        "message": refusal.message,
        "retry_after_s": refusal.retry_after_s,
    }


def _shadow(verdict: Verdict | None) -> Json | None:
    """What it would have done; its reasons are in its plan."""
    if verdict is None:
        return None
    refusal = verdict.refusal
    return {"rejection": _why_not(refusal) if refusal is not None else None, "plan": _plan(verdict.plan)}


def _actual(attempt: Attempt, offset_s: float) -> Json | None:
    if attempt.prefill_done is None and attempt.finished is None:
        return None
    prefilled = _prefilled(attempt.prefill_done) if attempt.prefill_done else {}
    joined: Json = {"joined_at": _at(attempt.joined_at, offset_s)}
    decoded = _decoded(attempt.finished) if attempt.finished else {}
    return {**prefilled, **joined, **decoded}


def _prefilled(done: PrefillDone) -> Json:
    return {
        "ttft_s": done.ttft_s,
        "queue_s": done.queue_s,
        "load_s": done.load_s,
        "compute_s": done.compute_s,
        "cached_tokens": {
            "dram": done.cached_dram_tokens,
            "ssd": done.cached_ssd_tokens,
            "remote": done.cached_remote_tokens,
        },
    }


def _decoded(finished: Finished) -> Json:
    return {
        "output_tokens": finished.output_tokens,
        "mean_tbt_s": finished.mean_tbt_s,
        "max_tbt_s": finished.max_tbt_s,
    }


def _failure(failed: Failed | None) -> Json | None:
    return {"worker": failed.worker_id, "code": failed.code} if failed is not None else None


def _at(reading: float | None, offset_s: float) -> float | None:
    return reading + offset_s if reading is not None else None


def _bound(seconds: float) -> float | None:
    """JSON knows no infinity."""
    return seconds if math.isfinite(seconds) else None
