"""Between the messages of `scheduler.proto` and the watches, and the values that the Conductor handles."""

import math
from dataclasses import asdict

from perigee.kvstore import store_pb2
from perigee.kvstore.blocks import KEY_BYTES, BlockKey
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler.commands import Dispatch, Proceed, Reject, ServerCommand, WorkerAddress
from perigee.scheduler.cost.accuracy import ErrorSummary
from perigee.scheduler.errors import InvalidMessage
from perigee.scheduler.events import (
    BlockEvents,
    Cancelled,
    Failed,
    Finished,
    Joined,
    PrefillDone,
    RequestArrived,
    RequestEvent,
)
from perigee.scheduler.ids import NodeId, ServerId, WorkerId
from perigee.scheduler.move_counts import MoveCounts
from perigee.scheduler.shadow import Shadow
from perigee.scheduler.slo import MAX_PRIORITY, MIN_PRIORITY, Slo
from perigee.workers import worker_pb2
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import WorkerReport
from perigee.workers.wire import ref_from_pb, ref_to_pb, report_from_pb

_ROLES = ("prefill", "decode", "mixed")


def event_from_pb(server: ServerId, message: pb.ServerEvent) -> RequestEvent:
    """Raises InvalidMessage."""
    if not message.ref.request_id:
        raise InvalidMessage("ref.request_id: is empty, allowed is any other string")
    ref = ref_from_pb(message.ref)
    match message.WhichOneof("event"):
        case "arrived":
            return _arrived(server, ref, message.arrived)
        case "prefill_done":
            return _prefill_done(server, ref, message.prefill_done)
        case "joined":
            return Joined(server, ref)
        case "finished":
            return _finished(server, ref, message.finished)
        case "failed":
            return Failed(server, ref, WorkerId(message.failed.worker_id), message.failed.code)
        case "cancelled":
            return Cancelled(server, ref)
        case _:
            raise InvalidMessage("event: is none that this Conductor knows")


def _arrived(server: ServerId, ref: Ref, message: pb.RequestArrived) -> RequestArrived:
    if message.num_tokens == 0:
        raise InvalidMessage("num_tokens: is 0, allowed are 1 and more")
    return RequestArrived(
        server=server,
        ref=ref,
        block_keys=tuple(_key(key) for key in message.block_keys),
        num_tokens=message.num_tokens,
        max_tokens=message.max_tokens,
        age_s=_seconds("age_s", message.age_s),
        tenant=message.tenant,
        priority=_priority(message.priority),
        slo=Slo(_bound("slo_ttft_s", message.slo_ttft_s), _bound("slo_tbt_s", message.slo_tbt_s)),
    )


def _prefill_done(server: ServerId, ref: Ref, message: pb.PrefillDone) -> PrefillDone:
    return PrefillDone(
        server=server,
        ref=ref,
        cached_tokens=message.cached_tokens,
        queue_s=_seconds("queue_s", message.queue_s),
        load_s=_seconds("load_s", message.load_s),
        compute_s=_seconds("compute_s", message.compute_s),
        ttft_s=_seconds("ttft_s", message.ttft_s),
        cached_ssd_tokens=message.cached_ssd_tokens,
        cached_remote_tokens=message.cached_remote_tokens,
    )


def _finished(server: ServerId, ref: Ref, message: pb.Finished) -> Finished:
    return Finished(
        server=server,
        ref=ref,
        output_tokens=message.output_tokens,
        mean_tbt_s=_seconds("mean_tbt_s", message.mean_tbt_s),
        max_tbt_s=_seconds("max_tbt_s", message.max_tbt_s),
    )


def blocks_from_pb(message: store_pb2.BlockEvents) -> BlockEvents:
    """Raises InvalidMessage."""
    return BlockEvents(
        node_id=NodeId(message.node_id),
        incarnation=message.incarnation,
        first_seq=message.first_seq,
        events=tuple(_block_event(event) for event in message.events),
        snapshot=message.snapshot,
        num_slots=message.num_slots,
    )


def _block_event(message: store_pb2.BlockEvent) -> BlockEvent:
    try:
        tier = Tier(message.tier)
    except ValueError:
        raise InvalidMessage(f"tier: is {message.tier}, allowed are {[each.value for each in Tier]}") from None
    return BlockEvent(message.kind == store_pb2.BlockEvent.STORED, _key(message.key), tier)


def worker_report_from_pb(message: worker_pb2.WorkerReport) -> WorkerReport:
    """Raises InvalidMessage."""
    if message.role not in _ROLES:
        raise InvalidMessage(f"role: is {message.role!r}, allowed are {', '.join(_ROLES)}")
    if message.card.block_tokens == 0:
        raise InvalidMessage("card.block_tokens: is 0, allowed are 1 and more")
    if message.free_pages > message.total_pages:
        raise InvalidMessage(f"free_pages: is {message.free_pages}, allowed are up to {message.total_pages}")
    _seconds("last_step_s", message.last_step_s)
    return report_from_pb(message)


def command_to_pb(command: ServerCommand, epoch: int) -> pb.Command:
    ref = ref_to_pb(command.ref)
    match command:
        case Dispatch():
            return pb.Command(epoch=epoch, ref=ref, dispatch=_dispatch(command))
        case Proceed():
            return pb.Command(epoch=epoch, ref=ref, proceed=pb.Proceed())
        case Reject():
            return pb.Command(epoch=epoch, ref=ref, reject=_reject(command))


def _dispatch(command: Dispatch) -> pb.Dispatch:
    return pb.Dispatch(
        prefill=_address(command.prefill),
        decode=_address(command.decode),
        prefill_source=command.prefill_source,
        decode_source=command.decode_source,
        predicted_ttft_s=command.predicted_ttft_s,
        predicted_tbt_s=command.predicted_tbt_s,
        rank=command.rank,
    )


def _reject(command: Reject) -> pb.Reject:
    return pb.Reject(
        reason=pb.Reject.Reason.ValueType(command.reason),
        message=command.message,
        retry_after_s=command.retry_after_s,
        predicted_ttft_s=command.predicted_ttft_s,
        predicted_tbt_s=command.predicted_tbt_s,
    )


def error_to_pb(summary: ErrorSummary) -> pb.PredictionError:
    return pb.PredictionError(**asdict(summary))


def moves_to_pb(counts: MoveCounts) -> pb.MoveCounts:
    return pb.MoveCounts(**asdict(counts))


def shadow_to_pb(shadow: Shadow) -> pb.ShadowState:
    names = shadow.policies.names
    return pb.ShadowState(placement=names.placement, admission=names.admission, **asdict(shadow.tally))


def _address(address: WorkerAddress) -> pb.WorkerAddress:
    return pb.WorkerAddress(id=address.id, address=address.address, incarnation=address.incarnation)


def _key(key: bytes) -> BlockKey:
    if len(key) != KEY_BYTES:
        raise InvalidMessage(f"block key: has {len(key)} bytes, allowed are {KEY_BYTES}")
    return BlockKey(key)


def _priority(value: int) -> int:
    if not MIN_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidMessage(f"priority: is {value}, allowed are {MIN_PRIORITY} to {MAX_PRIORITY}")
    return value


def _bound(field: str, value: float) -> float:
    return _seconds(field, value) or math.inf


def _seconds(field: str, value: float) -> float:
    """A duration. What differences of clock readings leave a hair below zero is zero."""
    if not math.isfinite(value):
        raise InvalidMessage(f"{field}: is {value}, allowed is any finite number of seconds")
    return max(0.0, value)
