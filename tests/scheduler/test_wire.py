"""What peers may send, and what becomes of it."""

import pytest

from perigee.kvstore import store_pb2
from perigee.kvstore.blocks import NO_SALT, BlockKey
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler.commands import Dispatch, Proceed, Reject, RejectReason, WorkerAddress
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
from perigee.scheduler.ids import ServerId, WorkerId
from perigee.scheduler.wire import blocks_from_pb, command_to_pb, event_from_pb, worker_report_from_pb
from perigee.workers import worker_pb2
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import WorkerReport
from perigee.workers.wire import ref_to_pb, report_to_pb
from tests.scheduler.cluster import CARD, STORE, keys

SERVER = ServerId("s")
REF = Ref("r", 1, 2)
KEY = BlockKey(NO_SALT)


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (
            pb.ServerEvent(
                arrived=pb.RequestArrived(block_keys=keys(64), num_tokens=64, max_tokens=9, age_s=0.5),
            ),
            RequestArrived(SERVER, REF, keys(64), 64, 9, 0.5),
        ),
        (
            pb.ServerEvent(
                prefill_done=pb.PrefillDone(cached_tokens=32, queue_s=0.1, load_s=0.2, compute_s=0.3, ttft_s=0.7)
            ),
            PrefillDone(SERVER, REF, 32, 0.1, 0.2, 0.3, 0.7),
        ),
        (pb.ServerEvent(joined=pb.Joined()), Joined(SERVER, REF)),
        (pb.ServerEvent(finished=pb.Finished(output_tokens=3, mean_tbt_s=0.1)), Finished(SERVER, REF, 3, 0.1)),
        (
            pb.ServerEvent(failed=pb.Failed(worker_id="w", code="no_room")),
            Failed(SERVER, REF, WorkerId("w"), "no_room"),
        ),
        (pb.ServerEvent(cancelled=pb.Cancelled()), Cancelled(SERVER, REF)),
    ],
    ids=lambda value: "" if isinstance(value, pb.ServerEvent) else type(value).__name__,
)
def test_every_event_of_a_server_is_understood(message: pb.ServerEvent, event: RequestEvent) -> None:
    message.ref.CopyFrom(ref_to_pb(REF))
    assert event_from_pb(SERVER, message) == event


def test_a_time_a_hair_below_zero_is_zero() -> None:
    message = pb.ServerEvent(ref=ref_to_pb(REF), prefill_done=pb.PrefillDone(queue_s=-1e-12))
    assert event_from_pb(SERVER, message) == PrefillDone(SERVER, REF)


@pytest.mark.parametrize("age_s", [float("inf"), float("-inf"), float("nan")])
def test_a_time_that_is_no_number_is_refused(age_s: float) -> None:
    message = pb.ServerEvent(ref=ref_to_pb(REF), arrived=pb.RequestArrived(num_tokens=1, age_s=age_s))
    with pytest.raises(InvalidMessage, match="age_s: is"):
        event_from_pb(SERVER, message)


def test_block_events_are_understood() -> None:
    message = store_pb2.BlockEvents(
        node_id=STORE,
        incarnation="1",
        first_seq=7,
        num_slots=77,
        events=[
            store_pb2.BlockEvent(kind=store_pb2.BlockEvent.STORED, tier=store_pb2.SSD, key=KEY),
            store_pb2.BlockEvent(kind=store_pb2.BlockEvent.REMOVED, key=KEY),
        ],
    )
    expected = (BlockEvent(True, KEY, Tier.SSD), BlockEvent(False, KEY, Tier.DRAM))
    assert blocks_from_pb(message) == BlockEvents(STORE, "1", 7, expected, num_slots=77)


def test_a_tier_that_nobody_knows_is_refused() -> None:
    event = store_pb2.BlockEvent(key=KEY)
    event.MergeFromString(b"\x10\x09")  # field 2, tier: 9
    with pytest.raises(InvalidMessage, match=r"tier: is 9, allowed are \[0, 1\]"):
        blocks_from_pb(store_pb2.BlockEvents(events=[event]))


def good_report() -> worker_pb2.WorkerReport:
    return report_to_pb(WorkerReport("w", "1", "decode", CARD, free_pages=3, total_pages=4))


def test_a_workers_report_is_understood() -> None:
    assert worker_report_from_pb(good_report()) == WorkerReport("w", "1", "decode", CARD, free_pages=3, total_pages=4)


def test_a_role_that_nobody_knows_is_refused() -> None:
    message = good_report()
    message.role = "judge"
    with pytest.raises(InvalidMessage, match="role: is 'judge', allowed are prefill, decode, mixed"):
        worker_report_from_pb(message)


def test_more_free_pages_than_there_are_is_refused() -> None:
    message = good_report()
    message.free_pages = 5
    with pytest.raises(InvalidMessage, match="free_pages: is 5, allowed are up to 4"):
        worker_report_from_pb(message)


def test_a_card_without_block_size_is_refused() -> None:
    message = good_report()
    message.card.block_tokens = 0
    with pytest.raises(InvalidMessage, match=r"card\.block_tokens: is 0"):
        worker_report_from_pb(message)


def test_commands_carry_epoch_and_ref() -> None:
    message = command_to_pb(Proceed(SERVER, REF), epoch=5)
    assert message == pb.Command(epoch=5, ref=ref_to_pb(REF), proceed=pb.Proceed())


def test_a_dispatch_keeps_all_its_fields() -> None:
    prefill, decode = WorkerAddress(WorkerId("p"), "unix:/p", "1"), WorkerAddress(WorkerId("d"), "unix:/d", "2")
    message = command_to_pb(Dispatch(SERVER, REF, prefill, decode, "left", "right", 0.5, 0.25), epoch=1)
    assert message.dispatch == pb.Dispatch(
        prefill=pb.WorkerAddress(id="p", address="unix:/p", incarnation="1"),
        decode=pb.WorkerAddress(id="d", address="unix:/d", incarnation="2"),
        prefill_source="left",
        decode_source="right",
        predicted_ttft_s=0.5,
        predicted_tbt_s=0.25,
    )


@pytest.mark.parametrize("reason", RejectReason)
def test_a_reject_keeps_all_its_fields(reason: RejectReason) -> None:
    message = command_to_pb(Reject(SERVER, REF, reason, "why", 2.0, 0.5, 0.25), epoch=1)
    assert pb.Reject.Reason.Name(message.reject.reason) == reason.name
    assert (message.reject.message, message.reject.retry_after_s) == ("why", 2.0)
    assert (message.reject.predicted_ttft_s, message.reject.predicted_tbt_s) == (0.5, 0.25)
