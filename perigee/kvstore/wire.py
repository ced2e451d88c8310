"""Between the messages of `store.proto` and plain values."""

from collections.abc import Iterable, Sequence

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.errors import Fenced, InvalidRequest, NoRoom, QuotaExceeded, StoreError, TooLarge
from perigee.kvstore.messages import (
    Acquired,
    BlockEvent,
    CommittedBlock,
    Fetched,
    LeasedBlock,
    Reservation,
    Tier,
)

_REASONS: dict[type[StoreError], pb.Refused.Reason.ValueType] = {
    NoRoom: pb.Refused.NO_ROOM,
    TooLarge: pb.Refused.TOO_LARGE,
    InvalidRequest: pb.Refused.INVALID,
    QuotaExceeded: pb.Refused.QUOTA,
    Fenced: pb.Refused.FENCED,
}
_ERRORS: dict[int, type[StoreError]] = {reason: error for error, reason in _REASONS.items()}


def refused_to_pb(error: StoreError) -> pb.Refused:
    return pb.Refused(reason=_REASONS[type(error)], message=str(error))


def refused_from_pb(refused: pb.Refused) -> StoreError:
    return _ERRORS.get(refused.reason, StoreError)(refused.message)


def acquired_to_pb(acquired: Acquired) -> pb.Acquired:
    return pb.Acquired(
        leased=_blocks_to_pb(acquired.leased),
        reserved=[pb.Reservation(index=r.index, slot=r.slot, nonce=r.nonce) for r in acquired.reserved],
    )


def acquired_from_pb(acquired: pb.Acquired) -> Acquired:
    reserved = tuple(Reservation(r.index, r.slot, r.nonce) for r in acquired.reserved)
    return Acquired(blocks_from_pb(acquired.leased), reserved)


def fetched_to_pb(fetched: Fetched) -> pb.Fetched:
    return pb.Fetched(blocks=_blocks_to_pb(fetched.blocks), done=fetched.done, missing=fetched.missing)


def committed_to_pb(blocks: Sequence[CommittedBlock]) -> pb.Commit:
    return pb.Commit(
        blocks=[
            pb.CommittedBlock(slot=b.slot, nonce=b.nonce, num_tokens=b.num_tokens, origin=pb.Origin.ValueType(b.origin))
            for b in blocks
        ]
    )


def committed_from_pb(commit: pb.Commit) -> list[CommittedBlock]:
    return [CommittedBlock(b.slot, b.nonce, b.num_tokens, b.origin) for b in commit.blocks]


def blocks_from_pb(blocks: Iterable[pb.Block]) -> tuple[LeasedBlock, ...]:
    return tuple(LeasedBlock(b.index, b.slot, b.num_tokens, b.origin, Tier(b.tier), b.remote) for b in blocks)


def event_to_pb(event: BlockEvent) -> pb.BlockEvent:
    kind = pb.BlockEvent.STORED if event.stored else pb.BlockEvent.REMOVED
    return pb.BlockEvent(kind=kind, tier=pb.Tier.ValueType(event.tier), key=event.key)


def _blocks_to_pb(blocks: Iterable[LeasedBlock]) -> list[pb.Block]:
    return [
        pb.Block(
            index=b.index,
            slot=b.slot,
            num_tokens=b.num_tokens,
            origin=pb.Origin.ValueType(b.origin),
            tier=pb.Tier.ValueType(b.tier),
            remote=b.remote,
        )
        for b in blocks
    ]
