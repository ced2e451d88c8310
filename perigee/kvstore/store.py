"""One node's tiers behind acquire, fetch, commit, release, pin, trim and lookup.

A synchronous core: requests, the ends of jobs and the current time go in, answers and jobs come out; whoever calls does
the I/O and tells how it ended. What cannot be answered yet waits here: for room, first come first served; for blocks
that are committed, or loaded from SSD, or pulled from another node. A block that comes serves all who wait for it, so
no two jobs bring the same one, unless nobody waits for the first any more: a load from a disk that has failed since, or
a pull of what was committed here meanwhile and is on SSD alone by now. The first to end wins.

Doubt is never served: a block that could not be read or received is not there, and whoever wanted it goes on without.
"""

from collections.abc import Callable, Iterable, Sequence

from perigee.kvstore.acquires import Acquires
from perigee.kvstore.blocks import NO_PARENT, BlockKey
from perigee.kvstore.errors import NoRoom, TooLarge
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.index import BlockIndex
from perigee.kvstore.jobs import Job
from perigee.kvstore.limits import StoreLimits, Totals
from perigee.kvstore.messages import BlockEvent, CommittedBlock, Fetched, Tier
from perigee.kvstore.moves import Moves, PulledBlock
from perigee.kvstore.pins import Pins
from perigee.kvstore.records import Location, Record
from perigee.kvstore.ssd_tier import SsdTier
from perigee.kvstore.tiers import Tiers
from perigee.kvstore.waiting import Acquire, Answer, Caller, Deadlines, Fetch, Fetches, check_keys, check_parent, joined


class Store:
    """Blocks of at most `block_tokens` tokens in `num_slots` slots, and in `ssd` if there is one. `now` is any clock in
    seconds that never goes back.

    Methods raise InvalidRequest, with nothing changed, for a request that is wrong in itself.
    """

    def __init__(
        self,
        num_slots: int,
        block_tokens: int,
        policy: EvictionPolicy,
        limits: StoreLimits | None = None,
        ssd: SsdTier | None = None,
    ) -> None:
        self.limits = limits or StoreLimits.of(num_slots)
        self.block_tokens = block_tokens
        self.index = BlockIndex(num_slots, block_tokens, policy, self.limits.reservation_s)
        self.ssd = ssd
        self.moves = Moves(self.index)
        self._tiers = Tiers(self.index, ssd, self.moves, self.limits)
        self.pins = Pins(self.index, self.limits.pins)
        self.totals = Totals()
        self._for_room: dict[Acquire | Fetch, None] = {}  # in order of arrival
        self._acquires = Acquires(self.index, self._tiers, self.moves, self.totals)
        self._fetches = Fetches()
        self._drop_at: float | None = None  # when the first who waits for room waits no longer for spills
        self._deadlines = Deadlines(lambda request: request in self._for_room or request in self._fetches)

    # ---- requests ------------------------------------------------------------------------------------------------

    def acquire(
        self, caller: Caller, keys: Sequence[BlockKey], parent: BlockKey, wait_s: float, now: float
    ) -> list[Answer]:
        """Leases the longest prefix of `keys` that is here and reserves a slot for each key after; or waits for room.

        What of the prefix is on SSD is loaded first.
        """
        check_keys(keys)
        check_parent(parent, keys)
        if len(keys) > self.index.num_slots:
            return [Answer(caller, self._too_large(len(keys)))]
        self.index.revive(keys, now)
        request = Acquire(caller, keys, parent, now + wait_s, self._drop_at_of(wait_s, now))
        if self._must_queue(request) or (answers := self._acquires.begin(request, now)) is None:
            if wait_s <= 0:
                return [Answer(caller, self._no_room(len(keys)))]
            self._queue(request)
            answers = []
        return answers + self._settle(now)

    def fetch(
        self,
        caller: Caller,
        keys: Sequence[BlockKey],
        wait_s: float,
        now: float,
        source: str = "",
        parent: BlockKey = NO_PARENT,
    ) -> list[Answer]:
        """Leases what is committed of `keys` now, and the others as they come: from SSD, from the node `source` if one
        is named, or by a commit here. Keys that are not committed follow each other, the first one `parent`.
        """
        check_keys(keys)
        self.index.revive(keys, now)
        found = tuple(self.index.lease(caller.group, enumerate(keys), now))
        indices = {block.index for block in found}
        awaited = {key: index for index, key in enumerate(keys) if index not in indices}
        if not awaited:
            return [Answer(caller, Fetched(found, done=True))]
        drop_at = self._drop_at_of(wait_s, now)
        request = Fetch(caller, keys, parent, source, now + wait_s, drop_at, wait_s > 0, awaited)
        self._fetches.add(request)
        if len(awaited) > self.index.num_slots and self._tiers.slots_needed(request) > self.index.num_slots:
            self._fetches.remove(request)
            return [Answer(caller, self._too_large(len(awaited)))]
        first = [Answer(caller, Fetched(found))] if found else []
        return joined(first + self._begin_fetch(request, now)) + self._settle(now)

    def commit(self, group: GroupId, blocks: Sequence[CommittedBlock], now: float) -> list[Answer]:
        """Makes written slots readable. The answers are for others: those who waited for these blocks, or for room."""
        stored = self.index.commit(group, blocks, now)
        return self._arrived(stored, now) + self._settle(now)

    def release(self, group: GroupId, now: float) -> list[Answer]:
        """Ends all that the group has and waits for."""
        ended = [request for request in self._waiting() if request.caller.group == group]
        answers = [self._give_up(request) for request in ended]
        self.index.release(group)
        return answers + self._settle(now)

    def disconnect(self, connection: int, now: float) -> list[Answer]:
        """Ends all that the connection has and waits for. None of the answers is for it."""
        for request in self._waiting():
            if request.caller.group.connection == connection:
                self._give_up(request)
        for group in self.index.groups_of(connection):
            self.index.release(group)
        return self._settle(now)

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of `keys` are here, in whichever tier. Extends nothing."""
        return self._tiers.lookup(keys)

    def pin(self, tenant: str, keys: Sequence[BlockKey], ttl_s: float, now: float) -> list[bool]:
        """Keeps those of `keys` that are in the arena there for `ttl_s` seconds; says which. Raises QuotaExceeded."""
        check_keys(keys)
        self.pins.expire(now)
        self.index.revive(keys, now)
        return self.pins.pin(tenant, keys, ttl_s, now)

    def unpin(self, tenant: str, keys: Sequence[BlockKey], now: float) -> list[Answer]:
        """Ends the tenant's pins on `keys`."""
        self.pins.unpin(tenant, keys)
        return self._settle(now)

    def trim(self, keys: Sequence[BlockKey], now: float) -> tuple[int, list[Answer]]:
        """Drops those of `keys`, in all tiers, that nobody leases, pins or waits for; says how many. A block stays as
        long as one that follows it is in the arena. Those that are just being written to SSD are not kept there.
        """
        check_keys(keys)
        self.pins.expire(now)
        trimmed = self._tiers.drop([key for key in keys if not self._fetches.of(key)])
        self.totals.trimmed_blocks += trimmed
        return trimmed, self._settle(now)

    # ---- what comes out besides answers ---------------------------------------------------------------------------

    def take_jobs(self) -> list[Job]:
        """What is to be done since the last call, in order."""
        return self.moves.take_jobs()

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order by tier."""
        return self._tiers.take_events()

    def snapshot(self) -> list[BlockEvent]:
        """All that is here, as events."""
        return self._tiers.snapshot()

    # ---- ends of jobs --------------------------------------------------------------------------------------------

    def loaded(self, job: int, record: Record | None, now: float) -> list[Answer]:
        """A load ended: with the record that now lies in the slot, or None if there is no such record any more."""
        key, location, came = self.moves.loaded(job, record, now)
        if self.ssd is not None:
            self.ssd.loaded(key, location, came)
        if came:
            self.totals.loaded_blocks += 1
            answers = self._arrived([key], now, Tier.SSD)
        else:
            self.totals.failed_loads += 1
            answers = self._did_not_come([key], lambda request: bool(request.source), now)
        return answers + self._loads_ended(key, now) + self._settle(now)

    def spilled(self, job: int, location: Location | None, now: float) -> list[Answer]:
        """A spill ended: with where the block lies now, or None if it could not be written."""
        key = self.moves.spilled(job)
        if self.ssd is not None:
            self.ssd.spilled(key, location)
        self.totals.spilled_blocks += location is not None
        return self._settle(now)

    def dropped(self, segment: int, now: float) -> list[Answer]:
        """The log has freed a segment."""
        if self.ssd is not None:
            self.ssd.dropped(segment)
        return self._settle(now)

    def pulled(self, job: int, blocks: Iterable[PulledBlock], now: float) -> list[Answer]:
        """Blocks that a pull was to bring lie whole in their slots."""
        arrived, wrong = self.moves.pulled(job, blocks, now)
        self.totals.pulled_blocks += len(arrived)
        self.totals.failed_pulls += len(wrong)
        answers = self._arrived(arrived, now, remote=True) + self._did_not_come(wrong, lambda _: False, now)
        return answers + self._settle(now)

    def pull_ended(self, job: int, broken: bool, now: float) -> list[Answer]:
        """A pull ended, and writes into no slot any more. What it did not bring is missing."""
        pulling = self.moves.pull_ended(job)
        self.totals.failed_pulls += len(pulling.expected)
        return self._did_not_come(
            pulling.keys, lambda request: pulling.may_repeat(request.source, request.deadline, broken), now
        ) + self._settle(now)

    def ssd_failed(self, now: float) -> list[Answer]:
        """The SSD tier is off: what is only there is nowhere. Loads under way still end, but nobody waits for them."""
        if self.ssd is not None:
            self.ssd.switch_off()
        keys = self.moves.give_up_loads()
        answers = self._did_not_come(keys, lambda request: bool(request.source), now)
        for key in keys:
            answers += self._loads_ended(key, now)
        return answers + self._settle(now)

    # ---- time ----------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` must be called next."""
        first = self._deadlines.next()
        for time in (self.pins.next_end(), self._drop_at):
            if time is not None and (first is None or time < first):
                first = time
        return first

    def expire(self, now: float) -> list[Answer]:
        """Gives up the requests whose time is over, and ends pins."""
        answers: list[Answer] = []
        while request := self._deadlines.pop(now):
            answers.append(self._give_up(request))
        self.pins.expire(now)
        return answers + self._settle(now)

    def _give_up(self, request: Acquire | Fetch) -> Answer:
        """Ends a request that waits."""
        self._for_room.pop(request, None)
        if isinstance(request, Acquire):
            self._acquires.give_up(request)
            return Answer(request.caller, self._no_room(len(request.keys)))
        missing = tuple(sorted([*request.missing, *request.awaited.values()]))
        self._leave(request)
        return Answer(request.caller, Fetched((), done=True, missing=missing))

    def _waiting(self) -> list[Acquire | Fetch]:
        return list(dict.fromkeys([*self._for_room, *self._acquires.all(), *self._fetches.all()]))

    # ---- waiting for room ----------------------------------------------------------------------------------------

    def _queue(self, request: Acquire | Fetch) -> None:
        self._for_room[request] = None
        self._deadlines.add(request)

    def _loads_ended(self, key: BlockKey, now: float) -> list[Answer]:
        """What that means for the acquires that waited for it: those that have to begin again go first in the queue."""
        answers, failed = self._acquires.load_ended(key, now)
        for request in failed:
            self._for_room = {request: None, **self._for_room}
            self._deadlines.add(request)
        return answers

    def _must_queue(self, request: Acquire | Fetch) -> bool:
        """Whether others wait for room before it. What needs no slot never waits behind what does."""
        others_wait = self._for_room and next(iter(self._for_room)) is not request
        return bool(others_wait) and not all(self.index.lookup(request.keys))

    def _settle(self, now: float) -> list[Answer]:
        """At the end of everything: serves those who wait for room, oldest first, and makes some ahead of need."""
        self.moves.settle()
        answers: list[Answer] = []
        while self._for_room:
            request = next(iter(self._for_room))
            served = self._try(request, now)
            if served is None:
                break
            del self._for_room[request]
            answers += served
        self._tiers.reclaim()
        first = next(iter(self._for_room), None)
        self._drop_at = first.drop_at if first and self.moves.num_spills and first.drop_at > now else None
        return answers

    def _drop_at_of(self, wait_s: float, now: float) -> float:
        """Until when a request that waits for so long lets blocks be spilled before it takes their slots."""
        return now + min(self.limits.spill_wait_s, wait_s / 2)

    def _try(self, request: Acquire | Fetch, now: float) -> list[Answer] | None:
        """None if there is no room for it."""
        if isinstance(request, Acquire):
            return self._acquires.begin(request, now)
        return [] if self._tiers.bring(request, now) else None

    def _no_room(self, num_blocks: int) -> NoRoom:
        return NoRoom(
            f"{num_blocks} blocks; {self.index.room} of {self.index.num_slots} slots are free or evictable, "
            f"{len(self._for_room)} requests are waiting"
        )

    def _too_large(self, num_blocks: int) -> TooLarge:
        return TooLarge(f"{num_blocks} blocks; the arena has {self.index.num_slots} slots")

    # ---- fetches -------------------------------------------------------------------------------------------------

    def _begin_fetch(self, request: Fetch, now: float) -> list[Answer]:
        """Has brought what can be brought, or queues for the room. Without patience the rest is missing."""
        if request.patient:
            self._deadlines.add(request)
        must_wait = self._must_queue(request) and self._tiers.slots_needed(request)
        has_begun = not must_wait and self._tiers.bring(request, now)
        if request.patient:
            if not has_begun:
                self._for_room[request] = None
            return []
        for key in [key for key in request.awaited if not self._tiers.is_coming(request, key)]:
            request.missing.append(self._fetches.drop(request, key))
        return self._complete(request)

    def _arrived(
        self, keys: Iterable[BlockKey], now: float, tier: Tier = Tier.DRAM, remote: bool = False
    ) -> list[Answer]:
        """Leases blocks that just came for those who wait for them, one answer per fetch."""
        answers: list[Answer] = []
        for request, wanted in self._fetches.arrived(keys).items():
            leased = self.index.lease(request.caller.group, wanted, now, tier, remote)
            answers += joined([Answer(request.caller, Fetched(tuple(leased))), *self._complete(request)])
        return answers

    def _did_not_come(self, keys: Iterable[BlockKey], again: Callable[[Fetch], bool], now: float) -> list[Answer]:
        """A load or pull did not bring these. Those of whom `again` says so try to get them otherwise; who waits for a
        commit goes on waiting; for the others the block is missing.
        """
        retried: dict[Fetch, None] = {}
        ended: dict[Fetch, None] = {}
        for key in keys:
            for request in self._fetches.of(key):
                if again(request):
                    retried[request] = None
                elif request.source or not request.patient:
                    request.missing.append(self._fetches.drop(request, key))
                    ended[request] = None
        answers = [answer for request in retried for answer in self._begin_fetch(request, now)]
        return answers + [answer for request in ended if request in self._fetches for answer in self._complete(request)]

    def _complete(self, request: Fetch) -> list[Answer]:
        """The last answer, if it waits for nothing any more."""
        if request.awaited:
            return []
        self._for_room.pop(request, None)
        self._fetches.remove(request)
        return [Answer(request.caller, Fetched((), done=True, missing=tuple(sorted(request.missing))))]

    def _leave(self, request: Fetch) -> None:
        """It waits for nothing any more. Pulls that nobody else waits for end with it."""
        keys = list(request.awaited)
        self._fetches.remove(request)
        for key in keys:
            pulling = self.moves.pulled_by(key)
            if pulling and not any(self._fetches.of(expected) for expected in pulling.keys):
                self.moves.cancel(pulling)
