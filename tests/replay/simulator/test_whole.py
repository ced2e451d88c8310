"""Whole simulations: the same every time, and nothing lost or left behind."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from perigee.kvstore.blocks import num_blocks
from perigee.replay.errors import ClusterError
from perigee.replay.metrics import Outcome, Slo, summarize
from perigee.replay.report import Run
from perigee.replay.simulator.cluster import Cluster, changed
from perigee.replay.simulator.simulation import Simulated, Simulation, simulate
from perigee.replay.simulator.worker import INCARNATION
from perigee.replay.trace import TraceRequest
from perigee.scheduler.commands import SetRole
from perigee.scheduler.ids import WorkerId
from tests.replay.simulator.clusters import BLOCK, DECODE, MIXED, PREFILL, PROFILE, cluster, request


def busy_trace(num_requests: int = 120) -> list[TraceRequest]:
    """Conversations of three turns in turn, some long; more than one node can do."""
    trace = []
    for index in range(num_requests):
        conversation, turn = index // 3 % 20, index % 3
        tokens = 40 + (index * 37) % 200 + 150 * turn + (1500 if index % 41 == 0 else 0)
        trace.append(request(0.04 * index, tokens, 1 + (index * 13) % 60, first_id=1000 * conversation))
    return trace


TIGHT = {"capacity_tokens": 2048, "kv_tokens": 2560}
KINDS = {
    "apart": [{**PREFILL, "count": 2, **TIGHT}, {**DECODE, "count": 2, **TIGHT}],
    "mixed": [{**MIXED, "count": 3, **TIGHT}],
    "pipelined": [{**PREFILL, "pipeline_stages": 3, **TIGHT}, {**DECODE, **TIGHT}],
    "with ssd": [{**PREFILL, "count": 2, **TIGHT, "ssd_gib": 0.002}, {**DECODE, **TIGHT, "ssd_gib": 0.002}],
    "one node": [{**PREFILL, "roles": ["prefill", "decode"], **TIGHT}],
}


def made(kind: str, folder: Path, admission: str) -> Cluster:
    return cluster(folder, *KINDS[kind], admission=admission, kv_bytes_per_token=64, save_outputs=True)


@pytest.mark.parametrize("admission", ["none", "perigee"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_ends_once_and_leaves_nothing_behind(kind: str, admission: str, tmp_path: Path) -> None:
    trace = busy_trace()
    simulation = Simulation(made(kind, tmp_path, admission))
    simulated = simulation.run(trace)
    assert len(simulated.records) == len(trace)
    assert {record.outcome for record in simulated.records} <= {Outcome.COMPLETED, Outcome.REJECTED}
    assert not simulation.front.flights and not simulation.control.conductor.view.requests
    for worker in simulation.control.workers.values():
        batcher = worker.engine.batcher
        assert (worker.num_attempts, len(batcher.active), len(batcher.waiting)) == (0, 0, 0)
        assert batcher.pool.num_free == batcher.pool.num_pages
    for node in simulation.control.nodes.values():
        assert (node.store.index.num_leased, node.store.index.num_reserved) == (0, 0)
        assert node.store.moves.is_idle


def as_bytes(simulated: Simulated) -> bytes:
    report = summarize(simulated.records, Slo(1.0, 0.1))
    run = Run("", {}, report, simulated.records, simulated.samples).as_json()
    return json.dumps([run, [asdict(record) for record in simulated.records]]).encode()


@pytest.mark.parametrize("kind", ["apart", "with ssd"])
def test_the_same_cluster_and_trace_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    made_of = made(kind, tmp_path, "perigee")
    assert as_bytes(simulate(busy_trace(), made_of)) == as_bytes(simulate(busy_trace(), made_of))


def test_all_that_was_not_cached_is_computed_once(tmp_path: Path) -> None:
    simulation = Simulation(made("apart", tmp_path, "none"))
    simulated = simulation.run(busy_trace())
    computed = sum(worker.computed_prompt_tokens for worker in simulation.control.workers.values())
    assert computed == sum(record.prompt_tokens - record.cached_tokens for record in simulated.records)


def test_the_conductor_knows_which_blocks_are_where(tmp_path: Path) -> None:
    simulation = Simulation(made("apart", tmp_path, "none"))
    simulation.run(busy_trace(30))
    view = simulation.control.conductor.view
    for name, node in simulation.control.nodes.items():
        keys = list(node.store.index.committed_keys())
        assert keys and all(view.prefixes.match([key]).get(name) for key in keys)


def test_samples_are_taken_every_second_until_the_end(tmp_path: Path) -> None:
    simulated = simulate(busy_trace(), made("apart", tmp_path, "none"))
    end_s = max(record.ended_s for record in simulated.records)
    assert [sample.at_s for sample in simulated.samples] == [float(second) for second in range(int(end_s) + 1)]
    assert max(sample.in_flight for sample in simulated.samples) > 5
    assert max(sample.decode_load or 0 for sample in simulated.samples) > 0


@pytest.mark.parametrize("stages", [1, 2])
def test_work_that_waits_is_that_of_each_prompt_by_itself(stages: int, tmp_path: Path) -> None:
    """Of four prompts none of which has seen another: twice as long a prompt would take four times as long."""
    profile = replace(PROFILE, prefill_token_s=0.0, prefill_pair_s=10.0 / (512 * 512 / 2))
    prefill = {**PREFILL, "chunk_tokens": 512, "pipeline_stages": stages}
    made_of = cluster(tmp_path, prefill, DECODE, profile=profile)
    samples = simulate([request(0.0, 512, 1, first_id=100 * index) for index in range(4)], made_of).samples
    assert samples[1].prefill_load_s == pytest.approx(40.0 / stages)


def test_prompts_are_cut_into_the_clusters_blocks(tmp_path: Path) -> None:
    simulation = Simulation(made("apart", tmp_path, "none"))
    simulation.run([request(0.0, 100, 1)])
    stored = sum(node.store.index.stored_total for node in simulation.control.nodes.values())
    assert stored == num_blocks(100, BLOCK)


def test_a_worker_changes_pools_when_nothing_is_on_it(tmp_path: Path) -> None:
    simulation = Simulation(made("apart", tmp_path, "none"))
    worker = simulation.control.workers["prefill-1"]
    change = SetRole(WorkerId("prefill-1"), INCARNATION, "decode")
    simulation.clock.at(0.5, simulation.control.execute, change)  # in the midst of its work: it stays what it is
    busy: list[str] = []
    simulation.clock.at(0.6, lambda: busy.append(worker.role))
    simulation.clock.at(100.0, simulation.control.execute, change)
    trace = [*busy_trace(), request(101.0, 300, 40, first_id=1), request(101.1, 300, 40, first_id=9000)]
    simulated = simulation.run(trace)
    assert (busy, worker.role) == (["prefill"], "decode")
    assert all(record.outcome is Outcome.COMPLETED for record in simulated.records)
    view = simulation.control.conductor.view.workers[WorkerId("prefill-1")]
    assert view.report is not None and view.report.role == "decode"


def test_a_shadow_is_compared_and_changes_nothing(tmp_path: Path) -> None:
    trace, alone = busy_trace(), made("apart", tmp_path, "perigee")
    watched = changed(alone, shadow="placement=random,admission=none")
    simulated = simulate(trace, watched)
    assert simulated.records == simulate(trace, alone).records
    report = simulated.shadow
    assert report is not None
    assert (report.acting.admission, report.shadow.placement, report.shadow.rejected) == ("perigee", "random", 0)
    assert report.decisions >= len(trace)
    assert 0 < report.placed_elsewhere < report.both_served == report.acting.served
    assert report.second.checks == sum(record.outcome is Outcome.COMPLETED for record in simulated.records)


def test_a_shadow_of_the_same_policies_would_have_done_the_same(tmp_path: Path) -> None:
    same = changed(made("apart", tmp_path, "perigee"), shadow="placement=perigee,admission=perigee")
    report = simulate(busy_trace(), same).shadow
    assert report is not None
    assert (report.placed_elsewhere, report.rejections_made, report.rejections_avoided) == (0, 0, 0)
    assert report.acting == report.shadow


def test_a_shadow_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"shadow: placement: 'lucky': allowed are .*, random"):
        changed(made("apart", tmp_path, "none"), shadow="placement=lucky")
