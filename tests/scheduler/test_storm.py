"""Whatever happens in whatever order: the same commands again, and nothing left on the books."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.commands import Command, Dispatch
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import (
    BlockEvents,
    Cancelled,
    Event,
    Failed,
    Finished,
    Joined,
    PrefillDone,
    RequestArrived,
    ServerLost,
    StoreLost,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from perigee.scheduler.ids import NodeId, ServerId, WorkerId
from perigee.scheduler.worker_view import DecodeLoad
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import WorkerReport
from tests.scheduler.cluster import CARD, keys

Recorded = tuple[Event, float]

ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode", "m0": "mixed"}
SERVERS = [ServerId("a"), ServerId("b")]

servers = st.sampled_from(SERVERS)
worker_ids = st.sampled_from(sorted(ROLES)).map(WorkerId)
nodes = st.sampled_from(["left", "right"]).map(NodeId)
incarnations = st.sampled_from(["1", "2"])
seconds = st.floats(0, 100)
counts = st.integers(0, 40)
refs = st.builds(Ref, st.sampled_from(["r", "s", "t"]), st.integers(0, 1), st.integers(0, 2))
prompts = st.builds(keys, st.integers(1, 300), st.integers(0, 1))
block_events = st.builds(BlockEvent, st.booleans(), prompts.map(lambda prompt: prompt[-1]), st.sampled_from(Tier))


@st.composite
def arrivals(draw: st.DrawFn) -> RequestArrived:
    num_tokens = draw(st.integers(1, 300))
    prompt = keys(num_tokens, draw(st.integers(0, 1)))
    return RequestArrived(draw(servers), draw(refs), prompt, num_tokens, draw(st.integers(0, 300)), draw(seconds))


@st.composite
def reports(draw: st.DrawFn) -> WorkerReport:
    worker_id = draw(worker_ids)
    total_pages = draw(counts)
    return WorkerReport(
        worker_id,
        draw(incarnations),
        ROLES[worker_id],
        replace(CARD, weights_digest=draw(st.sampled_from(["w", "w", "w", "odd"]))),
        queued_sequences=draw(counts),
        queued_prefill_tokens=draw(counts),
        running_sequences=draw(counts),
        context_tokens=draw(counts),
        free_pages=draw(st.integers(0, total_pages)),
        total_pages=total_pages,
        max_sequences=draw(counts),
        last_step_s=draw(seconds),
        draining=draw(st.booleans()) and draw(st.booleans()),
        steps_total=draw(counts),
    )


events = st.one_of(
    arrivals(),
    arrivals(),
    reports(),
    reports(),
    st.builds(PrefillDone, servers, refs, counts, seconds, seconds, seconds, seconds),
    st.builds(Joined, servers, refs),
    st.builds(Finished, servers, refs, counts, seconds),
    st.builds(Failed, servers, refs, worker_ids, st.just("internal")),
    st.builds(Cancelled, servers, refs),
    st.builds(ServerLost, servers),
    st.builds(WorkerJoined, worker_ids, incarnations, st.just("unix:/w"), nodes),
    st.builds(WorkerLost, worker_ids, incarnations),
    st.builds(
        BlockEvents,
        nodes,
        incarnations,
        st.integers(0, 4),
        st.lists(block_events, max_size=4).map(tuple),
        st.booleans(),
    ),
    st.builds(StoreLost, nodes, incarnations),
    st.just(Tick()),
)


def opening() -> list[Event]:
    """All members are there and idle, so that storms do more than be rejected."""
    joined: list[Event] = [BlockEvents(NodeId(node), "1", 0, (), snapshot=True) for node in ("left", "right")]
    for index, (worker_id, role) in enumerate(ROLES.items()):
        joined.append(WorkerJoined(WorkerId(worker_id), "1", "unix:/w", NodeId(("left", "right")[index % 2])))
        joined.append(WorkerReport(worker_id, "1", role, CARD, free_pages=40, total_pages=40, max_sequences=3))
    return joined


@st.composite
def storms(draw: st.DrawFn) -> list[Recorded]:
    now, recorded = 0.0, [(event, 0.0) for event in opening()]
    for event in draw(st.lists(events, max_size=40)):
        now += draw(st.sampled_from([0.0, 0.01, 1.0, 10.0]))
        recorded.append((event, now))
    return recorded


def play(conductor: Conductor, storm: list[Recorded]) -> list[list[Command]]:
    return [conductor.handle(event, now) for event, now in storm]


@settings(max_examples=150, deadline=None)
@given(storms())
def test_a_recorded_storm_gives_a_fresh_conductor_the_same_commands(storm: list[Recorded]) -> None:
    assert play(Conductor(), storm) == play(Conductor(), storm)


@settings(max_examples=150, deadline=None)
@given(storms())
def test_books_agree_throughout_and_are_empty_when_all_servers_are_gone(storm: list[Recorded]) -> None:
    conductor = Conductor()
    for event, now in storm:
        commands = conductor.handle(event, now)
        assert all(command.ref == event.ref for command in commands if isinstance(command, Dispatch))  # type: ignore[union-attr]
        assert_books_agree(conductor)
    for server in SERVERS:
        conductor.handle(ServerLost(server), now)
    assert not conductor.view.requests
    assert not conductor.view.failed
    assert all(not worker.prefills for worker in conductor.view.workers.values())
    assert all(worker.placed == DecodeLoad() for worker in conductor.view.workers.values())
    assert not len(conductor.view.fleet.work)


def assert_books_agree(conductor: Conductor) -> None:
    """Workers have on their books exactly what the requests in flight say, and nothing is negative."""
    view = conductor.view
    for worker in view.workers.values():
        assert set(worker.decodes) == {key for key, request in view.requests.items() if request.decode == worker.id}
        assert set(worker.prefills) <= {key for key, request in view.requests.items() if request.prefill == worker.id}
        assert worker.placed == sum(worker.decodes.values(), DecodeLoad())
        assert min(worker.load.sequences, worker.load.pages, worker.load.context_tokens) >= 0
    for request in view.requests.values():
        assert request.decode in view.workers


@settings(max_examples=50, deadline=None)
@given(storms(), st.sampled_from(["finish", "fail", "cancel"]))
def test_the_end_of_every_request_empties_the_books(storm: list[Recorded], end: str) -> None:
    conductor = Conductor()
    play(conductor, storm)
    for key, request in list(conductor.view.requests.items()):
        ends: dict[str, Event] = {
            "finish": Finished(key.server, request.ref, 5, 0.1),
            "fail": Failed(key.server, request.ref, request.decode, "internal"),
            "cancel": Cancelled(key.server, request.ref),
        }
        conductor.handle(ends[end], storm[-1][1])
    assert not conductor.view.requests
    assert all(not worker.prefills and not worker.decodes for worker in conductor.view.workers.values())
