"""The store beside a plain model of its memory, disk and peers: what anybody is given is what its key names, whatever
is asked and however jobs end, and once all is over nothing is left.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.errors import NoRoom, QuotaExceeded
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.jobs import CancelPull, DropSegment, Load, Pull, Spill
from perigee.kvstore.limits import StoreLimits
from perigee.kvstore.messages import Acquired, BlockEvent, CommittedBlock, Fetched, Tier
from perigee.kvstore.moves import PulledBlock
from perigee.kvstore.pins import PinLimits
from perigee.kvstore.records import Location, Record
from perigee.kvstore.ssd_index import SsdIndex
from perigee.kvstore.ssd_tier import SsdTier
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Answer, Caller
from tests.kvstore.fake_disk import FakeDisk
from tests.kvstore.keys import ROOT, chain, key

NUM_SLOTS = 6
FULL = 4
GARBAGE = key("garbage")  # what lies in a slot while it is written

paths = st.text("ab", min_size=1, max_size=4)
groups = st.builds(GroupId, st.integers(1, 3), st.integers(1, 2))
waits = st.sampled_from([0.0, 2.0, 8.0])
LIMITS = StoreLimits(PinLimits(2, 3, 100.0), reservation_s=1e9, free_low=1, free_high=3, spills=2)


@dataclass
class Waiting:
    """A request that was not answered for the last time."""

    keys: list[BlockKey]
    came: set[int] = field(default_factory=set)


class StoreAndModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.disk = FakeDisk(6, 2)
        self.ssd_index = SsdIndex(6, 2, self._recovered())
        self.store = Store(NUM_SLOTS, FULL, LRU(), LIMITS, SsdTier(self.ssd_index, FULL))
        self.now = 0.0
        self.requests = 0
        self.memory: dict[int, BlockKey] = {}  # by slot
        self.held: dict[GroupId, set[tuple[int, BlockKey]]] = {}  # slots that a group reads, and what it reads there
        self.reserved: dict[int, tuple[GroupId, BlockKey, int]] = {}  # slot: group, key, nonce
        self.waiting: dict[Caller, Waiting] = {}
        self.jobs: dict[int, Load | Spill | Pull] = {}
        self.coming: dict[int, dict[int, BlockKey]] = {}  # pull: place: key, of what it has not brought
        self.given_up: set[int] = set()  # loads from a disk that has failed since: nobody waits for them
        self.overtaken: set[tuple[int, BlockKey]] = set()  # pull, and what was committed before it has brought it
        self.told = {(event.tier, event.key) for event in self.store.snapshot()}

    def _recovered(self) -> list[tuple[Record, Location]]:
        """What is on the disk from before."""
        for path in ("a", "ab", "aba", "abab", "b", "bb"):
            record = Record(key(path), key(path[:-1]) if path[1:] else ROOT, FULL, PREFILL)
            self.disk.append(record, record.key)
        return [(record, location) for location, (record, _) in self.disk.stored.items()]

    # ---- requests ------------------------------------------------------------------------------------------------

    @rule(group=groups, path=paths, wait_s=waits)
    def acquire(self, group: GroupId, path: str, wait_s: float) -> None:
        keys = [key(path[:end]) for end in range(1, len(path) + 1)]
        caller = self.ask(group, keys)
        self.take(self.store.acquire(caller, keys, ROOT, wait_s, self.now))

    @rule(group=groups, path=paths, wait_s=waits, source=st.sampled_from(["", "near", "far"]))
    def fetch(self, group: GroupId, path: str, wait_s: float, source: str) -> None:
        keys = [key(path[:end]) for end in range(1, len(path) + 1)]
        caller = self.ask(group, keys)
        self.take(self.store.fetch(caller, keys, wait_s, self.now, source, ROOT))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), full=st.booleans())
    def commit(self, data: st.DataObject, full: bool) -> None:
        group = data.draw(st.sampled_from(sorted({entry[0] for entry in self.reserved.values()})))
        own = sorted(slot for slot, entry in self.reserved.items() if entry[0] == group)
        self._commit(group, data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True)), full)

    def _commit(self, group: GroupId, slots: list[int], full: bool) -> None:
        blocks = []
        for slot in slots:
            _, block_key, nonce = self.reserved.pop(slot)
            self.memory[slot] = block_key
            blocks.append(CommittedBlock(slot, nonce, FULL if full else 1, PREFILL))
        self.take(self.store.commit(group, blocks, self.now))

    @rule(path=paths)
    def put(self, path: str) -> None:
        """A whole prompt at once, if there is room, kept without lease."""
        group = GroupId(3, 9)
        self.acquire(group, path, 0.0)
        own = [slot for slot, entry in self.reserved.items() if entry[0] == group]
        self._commit(group, own, full=True)
        if not any(caller.group == group for caller in self.waiting):
            self.release(group)

    @rule(group=groups)
    def release(self, group: GroupId) -> None:
        self.forget({group})
        self.take(self.store.release(group, self.now))

    @rule(connection=st.integers(1, 3))
    def disconnect(self, connection: int) -> None:
        gone = {group for group in self.groups if group.connection == connection}
        self.forget(gone)
        self.waiting = {caller: w for caller, w in self.waiting.items() if caller.group not in gone}
        self.take(self.store.disconnect(connection, self.now))

    @rule(tenant=st.sampled_from("xy"), path=paths, ttl_s=st.sampled_from([1.0, 9.0]))
    def pin(self, tenant: str, path: str, ttl_s: float) -> None:
        try:
            self.store.pin(tenant, [key(path)], ttl_s, self.now)
        except QuotaExceeded:
            assert len(self.store.pins) >= min(LIMITS.pins.tenant_blocks, LIMITS.pins.total_blocks)

    @rule(tenant=st.sampled_from("xy"), path=paths)
    def unpin(self, tenant: str, path: str) -> None:
        self.take(self.store.unpin(tenant, [key(path)], self.now))

    @rule(asked=st.lists(paths, max_size=4, unique=True))
    def trim(self, asked: list[str]) -> None:
        keys = [key(path) for path in asked]
        before = self.told.copy()
        trimmed, answers = self.store.trim(keys, self.now)
        self.take(answers)
        if not self.jobs and not self.waiting:
            assert trimmed == len({block_key for _, block_key in before - self.told})
        assert before - self.told <= {(tier, block_key) for tier in Tier for block_key in keys}

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.store.expire(self.now))
        deadline = self.store.next_deadline()
        assert deadline is None or deadline > self.now

    # ---- ends of jobs --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), well=st.integers(0, 3))
    def end_job(self, data: st.DataObject, well: int) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.jobs))), well > 0)

    @precondition(lambda self: self.jobs)
    @rule()
    def end_all_jobs(self) -> None:
        while self.jobs:
            self.end(min(self.jobs), well=True)

    def end(self, number: int, well: bool) -> None:
        """A job goes on by one block, and ends if that was the last, or it failed."""
        match self.jobs[number]:
            case Load() as load:
                del self.jobs[number]
                record, self.memory[load.slot] = self.disk.read(load.location)
                assert record.key == load.key
                self.take(self.store.loaded(number, record if well else None, self.now))
            case Spill() as spill:
                del self.jobs[number]
                assert self.memory[spill.slot] == spill.record.key
                location = self.disk.append(spill.record, self.memory[spill.slot]) if well else None
                self.take(self.store.spilled(number, location, self.now))
            case Pull() as pull:
                self.go_on(pull, well)

    def go_on(self, pull: Pull, well: bool) -> None:
        coming = self.coming[pull.job]
        if well and coming:
            place, block_key = coming.popitem()
            self.memory[pull.expected[place].slot] = block_key
            self.take(self.store.pulled(pull.job, [PulledBlock(place, FULL, PREFILL)], self.now))
        else:
            del self.jobs[pull.job], self.coming[pull.job]
            self.take(self.store.pull_ended(pull.job, not well, self.now))

    @precondition(lambda self: self.store.ssd and not self.store.ssd.is_off)
    @rule(really=st.integers(0, 9))
    def ssd_fails(self, really: int) -> None:
        if really == 0:
            self.given_up = {number for number, job in self.jobs.items() if isinstance(job, Load)}
            self.take(self.store.ssd_failed(self.now))
            assert not any(tier is Tier.SSD for tier, _ in self.told)

    # ---- the model -----------------------------------------------------------------------------------------------

    @property
    def groups(self) -> set[GroupId]:
        return {*self.held, *(c.group for c in self.waiting), *(entry[0] for entry in self.reserved.values())}

    def ask(self, group: GroupId, keys: list[BlockKey]) -> Caller:
        self.requests += 1
        caller = Caller(group, self.requests)
        self.waiting[caller] = Waiting(keys)
        return caller

    def forget(self, gone: set[GroupId]) -> None:
        for group in gone:
            self.held.pop(group, None)
        self.reserved = {slot: entry for slot, entry in self.reserved.items() if entry[0] not in gone}

    def take(self, answers: list[Answer]) -> None:
        for answer in answers:
            self.hear(answer)
        for event in self.store.take_events():
            self.watch(event)
        for job in self.store.take_jobs():
            match job:
                case DropSegment():
                    self.disk.drop(job.segment)
                    self.take(self.store.dropped(job.segment, self.now))
                case CancelPull():
                    assert self.jobs.pop(job.job)
                    del self.coming[job.job]
                    self.take(self.store.pull_ended(job.job, False, self.now))
                case Load() | Spill():
                    self.jobs[job.job] = job
                    if isinstance(job, Load):
                        self.memory[job.slot] = GARBAGE
                case Pull():
                    self.jobs[job.job] = job
                    self.coming[job.job] = {place: block.key for place, block in enumerate(job.expected)}
                    self.memory.update((block.slot, GARBAGE) for block in job.expected)

    def watch(self, event: BlockEvent) -> None:
        entry = event.tier, event.key
        assert (entry in self.told) != event.stored
        (self.told.add if event.stored else self.told.remove)(entry)
        if event.stored:
            self.overtaken |= {(job, event.key) for job, coming in self.coming.items() if event.key in coming.values()}

    def hear(self, answer: Answer) -> None:
        caller, result = answer
        request = self.waiting[caller]
        if isinstance(result, Acquired):
            assert [block.index for block in result.leased] == list(range(len(result.leased)))
            assert [r.index for r in result.reserved] == list(range(len(result.leased), len(request.keys)))
            for r in result.reserved:
                assert r.slot not in self.reserved
                self.reserved[r.slot] = caller.group, request.keys[r.index], r.nonce
                self.memory[r.slot] = GARBAGE
        if isinstance(result, Acquired | Fetched):
            blocks = result.leased if isinstance(result, Acquired) else result.blocks
            for block in blocks:
                assert block.index not in request.came
                request.came.add(block.index)
                self.held.setdefault(caller.group, set()).add((block.slot, request.keys[block.index]))
        if isinstance(result, Fetched):
            assert not request.came & set(result.missing)
            assert not result.done or request.came | set(result.missing) == set(range(len(request.keys)))
        if not isinstance(result, Fetched) or result.done:
            assert isinstance(result, Acquired | Fetched | NoRoom)
            del self.waiting[caller]

    def teardown(self) -> None:
        for connection in (1, 2, 3):
            self.disconnect(connection)
        self.end_all_jobs()
        self.now += 1000.0
        self.take(self.store.expire(self.now))
        self.end_all_jobs()
        assert not self.waiting
        assert self.store.moves.is_idle
        assert (self.store.index.num_leased, self.store.index.num_reserved, len(self.store.pins)) == (0, 0, 0)
        assert self.store.index.room == NUM_SLOTS
        last = Caller(GroupId(4, 1), 1)
        ((_, acquired),) = self.store.acquire(last, chain("last", NUM_SLOTS), ROOT, 0.0, self.now)
        assert isinstance(acquired, Acquired)

    # ---- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def whoever_reads_reads_what_the_key_names(self) -> None:
        for held in self.held.values():
            assert all(self.memory[slot] == block_key for slot, block_key in held)

    @invariant()
    def no_slot_is_written_that_somebody_else_uses(self) -> None:
        loads = [job.slot for job in self.jobs.values() if isinstance(job, Load)]
        pulls = [
            job.expected[place].slot
            for job in self.jobs.values()
            if isinstance(job, Pull)
            for place in self.coming[job.job]
        ]
        written = [*self.reserved, *loads, *pulls]
        assert len(set(written)) == len(written)
        assert not set(written) & {slot for held in self.held.values() for slot, _ in held}

    @invariant()
    def no_block_is_brought_twice_at_once(self) -> None:
        loads = [job.key for job in self.jobs.values() if isinstance(job, Load) and job.job not in self.given_up]
        pulls = [(job, block_key) for job, coming in self.coming.items() for block_key in coming.values()]
        assert len(set(loads)) == len(loads)
        assert len({block_key for _, block_key in pulls}) == len(pulls)
        assert not set(loads) & {block_key for job, block_key in pulls if (job, block_key) not in self.overtaken}

    @invariant()
    def watchers_were_told_what_is_there(self) -> None:
        assert self.told == {(event.tier, event.key) for event in self.store.snapshot()}
        assert self.ssd_index.inconsistencies() == []

    @invariant()
    def everything_has_an_owner(self) -> None:
        assert self.store.index.orphaned({1, 2, 3}) == 0


StoreAndModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStoreAgainstModel = StoreAndModel.TestCase
