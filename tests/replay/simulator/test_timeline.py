"""What happens when, on clusters whose timeline is known."""

from pathlib import Path

import pytest

from perigee.replay.metrics import CachedByTier, Outcome, RequestRecord
from perigee.replay.simulator.cluster import Cluster
from perigee.replay.simulator.simulation import simulate
from perigee.replay.trace import TraceRequest
from tests.replay.simulator.clusters import DECODE, MIXED, PREFILL, cluster, request


def records(made_of: Cluster, *trace: TraceRequest) -> list[RequestRecord]:
    """In order of arrival."""
    return sorted(simulate(trace, made_of).records, key=lambda record: record.due_s)


def test_one_request_is_prefilled_sent_over_and_decoded(tmp_path: Path) -> None:
    (record,) = records(cluster(tmp_path), request(1.0, 64, 5))
    assert record.ttft_s == pytest.approx(0.064)
    # Its blocks are on the way for 6.4 ms, then four steps of 11 ms bring the tokens after the first.
    assert record.ended_s == pytest.approx(1.0 + 0.064 + 0.0064 + 4 * 0.011)
    assert record.tbt_s == pytest.approx(0.0064 + 0.011)  # the slowest gap waits for the blocks
    assert (record.outcome, record.output_tokens, record.cached_tokens) == (Outcome.COMPLETED, 5, 0)


def test_blocks_move_while_later_chunks_compute(tmp_path: Path) -> None:
    (record,) = records(cluster(tmp_path), request(0.0, 256, 2))
    # Two chunks of 128 tokens: only the second one's blocks are on their way when the first token is there.
    assert record.ended_s == pytest.approx(0.256 + 0.0128 + 0.011)


def test_a_prompt_waits_for_the_one_before_it(tmp_path: Path) -> None:
    first, second = records(cluster(tmp_path), request(0.0, 100, 2), request(0.010, 50, 2, first_id=90))
    assert first.ttft_s == pytest.approx(0.100)
    assert second.ttft_s == pytest.approx(0.100 + 0.050 - 0.010)


def test_a_known_prefix_is_not_computed_again(tmp_path: Path) -> None:
    first, second = records(cluster(tmp_path), request(0.0, 96, 2), request(1.0, 128, 2))
    assert first.cached_by_tier == CachedByTier()
    assert second.cached_by_tier == CachedByTier(dram=96)
    assert second.ttft_s == pytest.approx(0.032)


def test_the_last_token_of_a_wholly_known_prompt_is_computed(tmp_path: Path) -> None:
    _, second = records(cluster(tmp_path), request(0.0, 96, 2), request(1.0, 96, 2))
    assert second.cached_by_tier == CachedByTier(dram=95)


def test_a_prefix_comes_from_another_node_if_its_own_is_busy(tmp_path: Path) -> None:
    nodes = {**PREFILL, "count": 2}, DECODE
    trace = [
        request(0.0, 128, 1),
        request(1.0, 2048, 1),  # the holder of the prefix is the first choice for it
        request(1.1, 2048, 1, first_id=900),
        request(1.2, 129, 1),
    ]
    *_, last = records(cluster(tmp_path, *nodes), *trace)
    assert last.cached_by_tier is not None and last.cached_by_tier.total == 128


def test_a_sequence_joins_the_batch_at_the_end_of_a_step(tmp_path: Path) -> None:
    first, second = records(cluster(tmp_path), request(0.0, 32, 21), request(0.050, 32, 3, first_id=90))
    # The first decodes from 35.2 ms on in steps of 11 ms; the second's blocks come at 85.2 ms, in its fifth step. It
    # joins at 90.2 ms, and for two steps of 12 ms there are two.
    joined = 0.0352 + 5 * 0.011
    assert second.ended_s == pytest.approx(joined + 2 * 0.012)
    assert first.ended_s == pytest.approx(joined + 2 * 0.012 + 13 * 0.011)


def test_a_request_that_decode_has_no_room_for_is_turned_away(tmp_path: Path) -> None:
    made_of = cluster(tmp_path, PREFILL, {**DECODE, "max_sequences": 1}, admission="early")
    first, second = records(made_of, request(0.0, 32, 50), request(0.2, 32, 2, first_id=90))
    assert first.outcome is Outcome.COMPLETED
    assert (second.outcome, second.rejection, second.ttft_s) == (Outcome.REJECTED, "overload at arrival", None)


def test_an_answer_of_one_token_needs_no_decode_worker(tmp_path: Path) -> None:
    (record,) = records(cluster(tmp_path), request(0.0, 32, 1))
    assert (record.ended_s, record.tbt_s) == (pytest.approx(0.032), None)


def test_a_client_may_allow_for_more_than_comes(tmp_path: Path) -> None:
    (record,) = records(cluster(tmp_path, max_tokens=1000), request(0.0, 64, 5))
    assert (record.outcome, record.output_tokens) == (Outcome.COMPLETED, 5)
    (record,) = records(cluster(tmp_path, max_tokens=3), request(0.0, 64, 5))
    assert (record.outcome, record.output_tokens) == (Outcome.COMPLETED, 3)


# ---- coupled instances


def test_a_mixed_worker_stalls_what_it_decodes_for_a_chunk(tmp_path: Path) -> None:
    first, _ = records(cluster(tmp_path, MIXED), request(0.0, 32, 31), request(0.1, 256, 2, first_id=90))
    # The slowest three steps: two with 127 tokens of the prompt beside the one decoded, then one that decodes two.
    assert first.tbt_s == pytest.approx((0.128 + 0.128 + 0.012) / 3)


def test_without_chunks_a_whole_prompt_stalls_it(tmp_path: Path) -> None:
    made_of = cluster(tmp_path, MIXED, chunked_prefill=False)
    first, second = records(made_of, request(0.0, 32, 12), request(0.1, 256, 2, first_id=90))
    assert first.tbt_s == pytest.approx(0.257)
    assert second.ttft_s is not None and second.ttft_s >= 0.256


def test_without_a_prefix_cache_everything_is_computed(tmp_path: Path) -> None:
    made_of = cluster(tmp_path, MIXED, prefix_cache="none")
    _, second = records(made_of, request(0.0, 96, 2), request(1.0, 96, 2))
    assert (second.cached_tokens, second.ttft_s) == (0, pytest.approx(0.096))


def test_a_local_prefix_cache_never_pulls(tmp_path: Path) -> None:
    made_of = cluster(tmp_path, {**MIXED, "count": 2}, prefix_cache="local", placement="random")
    trace = [request(0.1 * index, 128 + index, 2) for index in range(20)]
    assert all(each.cached_by_tier and not each.cached_by_tier.remote for each in records(made_of, *trace))


# ---- groups of nodes, tiers, several workers a node


def test_a_group_computes_chunks_in_a_pipeline(tmp_path: Path) -> None:
    (alone,) = records(cluster(tmp_path, PREFILL, DECODE), request(0.0, 512, 1))
    (group,) = records(cluster(tmp_path, {**PREFILL, "pipeline_stages": 2}, DECODE), request(0.0, 512, 1))
    assert alone.ttft_s == pytest.approx(0.512)
    # Four chunks, each 64 ms on either node: five of those times, the first and last with one node idle.
    assert group.ttft_s == pytest.approx(5 * 0.064)


def test_what_left_memory_is_read_from_ssd(tmp_path: Path) -> None:
    prefill = {**PREFILL, "capacity_tokens": 512, "ssd_gib": 0.001, "kv_tokens": 512}
    made_of = cluster(tmp_path, prefill, DECODE, kv_bytes_per_token=64, eviction="lru")
    trace = [request(float(index), 256, 1, first_id=100 * index) for index in range(4)]
    *_, again = records(made_of, *trace, request(9.0, 257, 1))
    assert again.cached_by_tier is not None and again.cached_by_tier.ssd > 0


def test_both_phases_may_share_a_node(tmp_path: Path) -> None:
    both = {**PREFILL, "roles": ["prefill", "decode"]}
    (record,) = records(cluster(tmp_path, both), request(0.0, 64, 3))
    assert record.ended_s == pytest.approx(0.064 + 2 * 0.011)  # nothing has to be sent


def test_priorities_and_bounds_are_drawn_for_a_share_of_the_requests(tmp_path: Path) -> None:
    made_of = cluster(tmp_path, classes=[{"share": 0.5, "priority": 1}])
    trace = [request(0.1 * index, 32, 1, first_id=index) for index in range(40)]
    drawn = [record.priority for record in records(made_of, *trace)]
    assert 10 < sum(drawn) < 30
    assert drawn == [record.priority for record in records(made_of, *trace)]
