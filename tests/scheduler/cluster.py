"""A Conductor among workers, store nodes and servers that say what a test has them say."""

from dataclasses import replace
from typing import TypeVar

from perigee.kvstore.blocks import BlockKey, chain
from perigee.kvstore.messages import BlockEvent
from perigee.scheduler.commands import Command, Dispatch, Reject
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.events import (
    BlockEvents,
    Event,
    Failed,
    Finished,
    Joined,
    PrefillDone,
    RequestArrived,
    WorkerJoined,
)
from perigee.scheduler.ids import NodeId, ServerId, WorkerId
from perigee.scheduler.policies import make_policies
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import ModelCard, WorkerReport

BLOCK_TOKENS = 32
ROOT = BlockKey(bytes(32))
SERVER = ServerId("server-1")
STORE = NodeId("store-0")

CARD = ModelCard(
    name="small",
    weights_digest="w",
    config_digest="c",
    tokenizer_digest="t",
    dtype="float32",
    block_tokens=BLOCK_TOKENS,
    max_context=1 << 20,
    vocab_size=1000,
    namespace=ROOT,
)

# A second for a thousand tokens, and nothing fixed, so that estimates can be read off a test.
PROFILE = CostProfile(
    prefill_fixed_s=0.0,
    prefill_token_s=1e-3,
    prefill_pair_s=0.0,
    load_token_s=1e-5,
    step_fixed_s=0.01,
    step_sequence_s=0.001,
    step_context_token_s=1e-6,
)

_Command = TypeVar("_Command", bound=Command)


def keys(num_tokens: int, salt: int = 0) -> tuple[BlockKey, ...]:
    """Block keys of a prompt. Two of the same salt are prefixes of each other, as far as they are whole blocks."""
    return tuple(chain(ROOT, [salt] * num_tokens, BLOCK_TOKENS))


def only(commands: list[Command], kind: type[_Command]) -> _Command:
    """The one command there is, which is of this kind."""
    (command,) = commands
    assert isinstance(command, kind), command
    return command


class Cluster:
    """Feeds a Conductor. `now` is the test's to move."""

    def __init__(self, profile: CostProfile = PROFILE, admission: str = "perigee") -> None:
        self.conductor = Conductor(make_policies(admission=admission), profile)
        self.now = 100.0
        self._arrivals: dict[Ref, RequestArrived] = {}

    def hear(self, event: Event) -> list[Command]:
        return self.conductor.handle(event, self.now)

    # ---- members

    def add_store(
        self, node: NodeId = STORE, held: tuple[BlockKey, ...] = (), incarnation: str = "1", num_slots: int = 0
    ) -> None:
        events = tuple(BlockEvent(True, key) for key in held)
        assert self.hear(BlockEvents(node, incarnation, 0, events, snapshot=True, num_slots=num_slots)) == []

    def add_worker(
        self, worker_id: str, role: str, store: NodeId = STORE, incarnation: str = "1", **report: object
    ) -> list[Command]:
        """A worker that joins and reports: 100 pages and 8 places unless it says otherwise."""
        address = f"unix:/{worker_id}"
        assert self.hear(WorkerJoined(WorkerId(worker_id), incarnation, address, store)) == []
        return self.report(worker_id, role, incarnation, **report)

    def report(self, worker_id: str, role: str, incarnation: str = "1", **fields: object) -> list[Command]:
        idle = WorkerReport(worker_id, incarnation, role, CARD, free_pages=100, total_pages=100, max_sequences=8)
        return self.hear(replace(idle, **fields))  # type: ignore[arg-type]

    # ---- requests

    def arrive(
        self,
        request_id: str,
        num_tokens: int = 64,
        max_tokens: int = 32,
        *,
        attempt: int = 0,
        salt: int = 0,
        server: ServerId = SERVER,
        **more: object,
    ) -> list[Command]:
        """`more` are further fields of the event."""
        arrived = RequestArrived(server, Ref(request_id, 0, attempt), keys(num_tokens, salt), num_tokens, max_tokens)
        return self.hear(replace(arrived, **more))  # type: ignore[arg-type]

    def dispatch(self, request_id: str, num_tokens: int = 64, max_tokens: int = 32, **arrival: object) -> Dispatch:
        return only(self.arrive(request_id, num_tokens, max_tokens, **arrival), Dispatch)  # type: ignore[arg-type]

    def reject(self, request_id: str, num_tokens: int = 64, max_tokens: int = 32, **arrival: object) -> Reject:
        return only(self.arrive(request_id, num_tokens, max_tokens, **arrival), Reject)  # type: ignore[arg-type]

    def prefill_done(self, request_id: str, attempt: int = 0, **fields: object) -> list[Command]:
        return self.hear(PrefillDone(SERVER, Ref(request_id, 0, attempt), **fields))  # type: ignore[arg-type]

    def joined(self, request_id: str, attempt: int = 0) -> list[Command]:
        return self.hear(Joined(SERVER, Ref(request_id, 0, attempt)))

    def finish(self, request_id: str, attempt: int = 0, output_tokens: int = 32) -> list[Command]:
        return self.hear(Finished(SERVER, Ref(request_id, 0, attempt), output_tokens, 0.01))

    def fail(self, request_id: str, worker_id: str, attempt: int = 0) -> list[Command]:
        return self.hear(Failed(SERVER, Ref(request_id, 0, attempt), WorkerId(worker_id), "internal"))


def one_of_each(prefill: int = 1, decode: int = 1, admission: str = "perigee") -> Cluster:
    """A cluster of `p0`, `p1` … and `d0`, `d1` … around one store node."""
    cluster = Cluster(admission=admission)
    cluster.add_store()
    for index in range(prefill):
        cluster.add_worker(f"p{index}", "prefill")
    for index in range(decode):
        cluster.add_worker(f"d{index}", "decode")
    return cluster
