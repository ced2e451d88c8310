"""Workers change pools when one pool has needed them for long, after their requests have ended, and else never."""

from dataclasses import dataclass, field, replace

import pytest

from perigee.scheduler.balance.roles import Roles
from perigee.scheduler.commands import Command, Drain, SetRole
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import Tick, WorkerLost
from perigee.scheduler.ids import WorkerId
from perigee.scheduler.policies import make_policies
from tests.scheduler.cluster import PROFILE, STORE, Cluster

HOLD_S = 10.0


@dataclass
class Scene:
    """A cluster in which every worker reports each second, and does what it is told. `busy` sequences are another
    Conductor's: so many on each worker of that name, tokens of a prompt where it prefills.
    """

    roles: dict[str, str]
    obeys: bool = True
    busy: dict[str, int] = field(default_factory=dict)
    said: list[Drain | SetRole] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cluster = Cluster()
        self.cluster.conductor = Conductor(replace(make_policies(), balance=Roles(HOLD_S)), PROFILE)
        self.cluster.add_store()
        for worker, role in self.roles.items():
            self.cluster.add_worker(worker, role)

    def load(self, prefill: int = 0, decode: int = 0) -> None:
        """Prompt tokens on each worker that prefills, and sequences on each that decodes, where eight have room."""
        self.busy = {name: {"prefill": prefill, "decode": decode}.get(role, 0) for name, role in self.roles.items()}

    def pass_seconds(self, seconds: int) -> None:
        for _ in range(seconds):
            self.cluster.now += 1.0
            for worker in self.roles:
                self._report(worker)
            for command in self.cluster.hear(Tick()):
                self._do(command)

    def _report(self, worker: str) -> None:
        role, busy = self.roles[worker], self.busy.get(worker, 0)
        if role == "prefill":
            self.cluster.report(worker, role, queued_prefill_tokens=busy, queued_sequences=int(busy > 0))
        else:
            self.cluster.report(worker, role, running_sequences=busy)

    def _do(self, command: Command) -> None:
        assert isinstance(command, Drain | SetRole), command
        self.said.append(command)
        if isinstance(command, SetRole) and self.obeys:
            self.roles[command.worker_id] = command.role

    @property
    def drained(self) -> list[tuple[str, bool]]:
        return [(said.worker_id, said.draining) for said in self.said if isinstance(said, Drain)]

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(said.worker_id, said.role) for said in self.said if isinstance(said, SetRole)]


def scene(prefill: int = 3, decode: int = 3, obeys: bool = True) -> Scene:
    roles = {f"p{index}": "prefill" for index in range(prefill)} | {f"d{index}": "decode" for index in range(decode)}
    return Scene(roles, obeys)


def test_a_lasting_imbalance_moves_one_worker_and_no_more() -> None:
    made = scene()
    made.load(prefill=2000)
    made.pass_seconds(60)
    (moved,) = made.told
    assert moved[1] == "prefill"
    assert made.drained == [(moved[0], True), (moved[0], False)]
    # Three workers' work is now done by four.
    made.busy = {name: 1500 for name, role in made.roles.items() if role == "prefill"}
    made.busy["p0"] = 0
    made.pass_seconds(300)
    assert len(made.told) == 1
    assert sorted(made.roles.values()) == ["decode"] * 2 + ["prefill"] * 4


def test_it_goes_both_ways() -> None:
    made = scene()
    made.load(decode=8)
    made.pass_seconds(60)
    assert [role for _, role in made.told] == ["decode"]


def test_nothing_moves_before_the_imbalance_has_lasted() -> None:
    made = scene()
    made.load(prefill=2000)
    made.pass_seconds(int(HOLD_S))
    assert not made.said


@pytest.mark.parametrize("half_s", [1, 5, 10])
def test_a_load_that_swings_moves_nobody(half_s: int) -> None:
    made = scene()
    for _ in range(300 // half_s):
        made.load(prefill=2000)
        made.pass_seconds(half_s)
        made.load(decode=8)
        made.pass_seconds(half_s)
    assert not made.said


def test_a_load_that_comes_and_goes_for_minutes_is_followed_without_haste() -> None:
    made = scene()
    for _ in range(3):
        made.load(prefill=2000)
        made.pass_seconds(120)
        made.load()
        made.pass_seconds(120)
    assert len(made.told) <= 3, "idle pools ask for nothing back"


@pytest.mark.parametrize(("prefill", "decode"), [(3, 1), (1, 3)])
def test_the_last_worker_of_a_pool_stays(prefill: int, decode: int) -> None:
    made = scene(prefill, decode)
    made.load(prefill=2000 if decode == 1 else 0, decode=8 if prefill == 1 else 0)
    made.pass_seconds(120)
    assert not made.said


def test_a_pool_that_needs_its_workers_gives_none() -> None:
    made = scene()
    made.load(prefill=2000, decode=4)  # half full: without one of three, three quarters
    made.pass_seconds(120)
    assert not made.said


def test_mixed_workers_stay_mixed() -> None:
    made = Scene({"m0": "mixed", "m1": "mixed", "p0": "prefill", "d0": "decode", "d1": "decode"})
    made.load(prefill=2000)
    made.pass_seconds(120)
    assert not made.said


def test_no_work_comes_to_a_worker_that_drains_and_it_is_told_when_its_last_request_has_ended() -> None:
    made = scene(1, 2)
    first = made.cluster.dispatch("r")
    made.cluster.prefill_done("r")
    made.cluster.joined("r")
    second = made.cluster.dispatch("s")
    made.cluster.prefill_done("s")
    made.cluster.joined("s")
    assert {first.decode.id, second.decode.id} == {"d0", "d1"}
    made.busy = {"p0": 2000, "d0": 1, "d1": 1}
    made.pass_seconds(50)
    ((drained, _),) = made.drained
    assert not made.told, "it has a request still"
    for name in ("t", "u", "v"):
        assert made.cluster.dispatch(name).decode.id != drained
    made.cluster.finish("r" if first.decode.id == drained else "s")
    made.busy[drained] = 0
    made.pass_seconds(2)
    assert made.told == [(drained, "prefill")]
    assert not made.cluster.conductor.view.workers[WorkerId(drained)].draining


def test_what_a_prefill_worker_has_handed_over_is_waited_for() -> None:
    made = scene(2, 1)
    made.load(decode=8)
    made.busy["p0"] = made.busy["p1"] = 0
    dispatches = [made.cluster.dispatch(name) for name in ("r", "s")]
    assert {each.prefill.id for each in dispatches} == {"p0", "p1"}
    for name in ("r", "s"):
        made.cluster.prefill_done(name)
    made.pass_seconds(60)
    assert len(made.drained) == 1 and not made.told, "decode has not got the blocks"
    made.cluster.joined("r")
    made.cluster.joined("s")
    made.pass_seconds(1)
    assert len(made.told) == 1


def test_a_worker_that_does_not_change_is_used_again_and_spared_for_a_while() -> None:
    made = scene(obeys=False)
    made.load(prefill=2000)
    made.pass_seconds(50)
    worker = made.told[0][0]
    assert len(made.told) > 1, "it is asked again"
    assert made.drained[:2] == [(worker, True), (worker, False)]
    assert not made.cluster.conductor.view.workers[WorkerId(worker)].draining
    made.pass_seconds(30)
    assert made.told[-1][0] != worker


def test_a_worker_that_does_not_come_to_its_end_is_used_again() -> None:
    made = scene(1, 2)
    made.busy = {"p0": 2000, "d0": 1, "d1": 1}
    names = ("r", "s")
    for name in names:
        made.cluster.dispatch(name)
        made.cluster.prefill_done(name)
        made.cluster.joined(name)
    made.pass_seconds(300)
    assert not made.told
    assert made.drained[0][1] and not made.drained[1][1]


def test_a_worker_is_used_again_when_its_own_pool_comes_to_need_it() -> None:
    made = scene(1, 2)
    made.cluster.dispatch("r")
    made.cluster.prefill_done("r")
    made.cluster.joined("r")
    made.cluster.dispatch("s")
    made.cluster.prefill_done("s")
    made.cluster.joined("s")
    made.busy = {"p0": 2000, "d0": 1, "d1": 1}
    made.pass_seconds(50)
    ((drained, _),) = made.drained
    made.busy = {"p0": 2000, "d0": 8, "d1": 8}
    made.pass_seconds(25)
    assert made.drained == [(drained, True), (drained, False)]
    assert not made.told


def test_a_worker_that_dies_while_it_drains_is_forgotten() -> None:
    made = scene(3, 3)
    for name in ("r", "s", "t"):
        made.cluster.dispatch(name)
        made.cluster.prefill_done(name)
        made.cluster.joined(name)
    made.busy = {name: 2000 if role == "prefill" else 1 for name, role in made.roles.items()}
    made.pass_seconds(50)
    ((drained, _),) = made.drained
    del made.roles[drained]
    made.cluster.hear(WorkerLost(WorkerId(drained), "1"))
    made.pass_seconds(1)
    made.roles[drained] = "decode"
    made.cluster.add_worker(drained, "decode", STORE, incarnation="2")
    assert not made.cluster.conductor.view.workers[WorkerId(drained)].draining
    assert not made.told
