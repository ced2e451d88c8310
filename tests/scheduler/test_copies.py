"""Hot prefixes are copied to where they are missed, cold copies trimmed where room is short, and the last one never."""

import pytest

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.messages import BlockEvent
from perigee.scheduler.commands import Replicate, Trim
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.copy_log import CopyLog
from perigee.scheduler.events import BlockEvents, Tick
from perigee.scheduler.hot_prefixes import HotPrefixes
from perigee.scheduler.ids import NodeId
from perigee.scheduler.policies import make_policies
from tests.scheduler.cluster import BLOCK_TOKENS, PROFILE, ROOT, Cluster, keys

SHARED = 16 * BLOCK_TOKENS
NODES = [NodeId(f"store-{index}") for index in range(4)]


class Several(Cluster):
    """A prefill worker on each of four nodes, and a decode worker that all of them share a node with, or none."""

    def __init__(self, placement: str = "local-cache", num_slots: int = 1000, balance: str = "copies") -> None:
        super().__init__()
        self.conductor = Conductor(make_policies(placement, balance=balance), PROFILE)
        self.seqs: dict[NodeId, int] = {}
        self.num_slots = num_slots
        for node in (*NODES, NodeId("store-d")):
            self.add_store(node, num_slots=num_slots)
            self.seqs[node] = 0
        for index, node in enumerate(NODES):
            self.add_worker(f"p{index}", "prefill", node)
        self.add_worker("d0", "decode", NodeId("store-d"), max_sequences=1000, total_pages=100_000, free_pages=100_000)

    def blocks(self, node: NodeId, held: tuple[BlockKey, ...], stored: bool = True) -> None:
        """Blocks come to a node, or leave it."""
        events = tuple(BlockEvent(stored, key) for key in held)
        assert self.hear(BlockEvents(node, "1", self.seqs[node], events, num_slots=self.num_slots)) == []
        self.seqs[node] += len(events)

    def tick(self, seconds: float = 1.0) -> list[Replicate | Trim]:
        self.pass_time(seconds)
        said = self.hear(Tick())
        return [each for each in said if isinstance(each, Replicate | Trim)]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for index in range(len(NODES)):
            self.report(f"p{index}", "prefill")
        self.report("d0", "decode", max_sequences=1000, total_pages=100_000, free_pages=100_000)

    def ask(self, count: int, start: int = 0) -> None:
        """Prompts that go on differently after what they share."""
        for index in range(start, start + count):
            self.dispatch(f"r{index}", SHARED + BLOCK_TOKENS + index % 7, 1)

    def miss(self, count: int) -> None:
        """The shared prefix is on one node alone, and too many ask for it."""
        self.blocks(NODES[0], keys(SHARED))
        self.ask(count)


def test_a_prefix_that_is_missed_often_is_copied_to_a_node_that_lacks_it() -> None:
    cluster = Several()
    cluster.miss(40)
    first, *_ = cluster.tick()
    assert isinstance(first, Replicate)
    assert (first.source, first.parent, first.keys) == (NODES[0], ROOT, keys(SHARED))
    assert first.node_id in NODES[1:]


def test_what_nobody_misses_is_not_copied() -> None:
    cluster = Several()
    cluster.blocks(NODES[0], keys(SHARED))
    cluster.ask(1)
    assert cluster.tick() == []


def test_what_nobody_holds_is_not_copied() -> None:
    cluster = Several()
    cluster.ask(40)
    assert len(cluster.conductor.view.hot_prefixes) == 0
    assert cluster.tick() == []


def test_it_is_copied_to_each_node_once() -> None:
    cluster = Several()
    cluster.miss(40)
    said = [each for _ in range(20) for each in cluster.tick()]
    targets = [(each.node_id, each.keys) for each in said if isinstance(each, Replicate)]
    assert targets and len(targets) == len(set(targets))


def test_copies_that_have_come_are_not_asked_for_again() -> None:
    cluster = Several()
    cluster.miss(40)
    for node in NODES[1:]:
        cluster.blocks(node, keys(SHARED))
    assert cluster.tick() == []


def test_only_few_are_copied_at_once_and_none_over_a_link_that_is_busy() -> None:
    cluster = Several()
    cluster.miss(60)
    assert len(cluster.tick(0.0)) == 1, "the only holder sends one copy after the other"
    assert cluster.tick(0.0) == []


def test_demand_that_has_gone_is_forgotten() -> None:
    cluster = Several()
    cluster.miss(40)
    assert cluster.tick(3600.0) == []


def test_a_prefix_that_was_fetched_counts_by_what_fetching_takes() -> None:
    cluster = Several("global-cache")
    cluster.miss(4)
    (hot,) = cluster.conductor.view.hot_prefixes.hottest(1, cluster.now)
    assert hot.lately_s(cluster.now) <= 4 * PROFILE.transfer_s(float(SHARED))


def test_memory_of_what_is_hot_is_bounded() -> None:
    cluster = Several()
    for index in range(1100):
        prompt = keys(2 * BLOCK_TOKENS, salt=index)
        cluster.blocks(NodeId("store-d"), prompt)
        cluster.dispatch(f"r{index}", 2 * BLOCK_TOKENS, 1, salt=index)
        cluster.finish(f"r{index}")
    assert 0 < len(cluster.conductor.view.hot_prefixes) <= 1024


def test_nothing_is_noted_where_nobody_makes_copies() -> None:
    cluster = Several(balance="roles")
    cluster.miss(40)
    view = cluster.conductor.view
    assert (len(view.hot_prefixes), len(view.copy_log)) == (0, 0)


# ---- trimming


FULL = 60  # slots


def handed_over(count: int, num_slots: int = FULL) -> Several:
    """Prompts of four blocks, which are on the nodes that computed them and on the one that decoded them."""
    cluster = Several("least-loaded", num_slots)
    for index in range(count):
        prompt = keys(4 * BLOCK_TOKENS, salt=index)
        dispatch = cluster.dispatch(f"r{index}", 4 * BLOCK_TOKENS, 8, salt=index)
        cluster.blocks(NODES[int(dispatch.prefill.id[1:])], prompt)
        cluster.blocks(NodeId("store-d"), prompt)
        cluster.finish(f"r{index}")
        cluster.now += 0.1
    return cluster


def test_cold_copies_are_trimmed_where_room_is_short_those_first_that_were_used_longest_ago() -> None:
    cluster = handed_over(14)  # 56 of 60
    said = cluster.tick(60.0)
    assert said and all(each == Trim(NodeId("store-d"), keys(4 * BLOCK_TOKENS, salt=i)) for i, each in enumerate(said))
    assert 56 - sum(len(each.keys) for each in said) <= 0.85 * FULL


def test_nothing_is_trimmed_where_there_is_room() -> None:
    assert handed_over(10).tick(60.0) == []


def test_what_was_asked_for_lately_is_not_trimmed() -> None:
    cluster = handed_over(14)
    cluster.pass_time(60.0)
    for index in range(14):
        cluster.dispatch(f"again{index}", 4 * BLOCK_TOKENS, 1, salt=index)
    assert not [said for said in cluster.tick() if isinstance(said, Trim)]


def test_the_last_copy_is_never_trimmed() -> None:
    cluster = handed_over(14)
    for index in range(14):
        for node in NODES:
            cluster.blocks(node, keys(4 * BLOCK_TOKENS, salt=index), stored=False)
    assert cluster.tick(60.0) == []


def test_copies_that_their_nodes_evicted_do_not_keep_others_from_being_trimmed() -> None:
    cluster = Several(num_slots=100)
    log, node = cluster.conductor.view.copy_log, NODES[0]
    for index in range(2000):
        log.add(node, keys(3 * BLOCK_TOKENS, salt=1000 + index), cluster.now)
    long = keys(96 * BLOCK_TOKENS)
    cluster.blocks(node, long)
    cluster.blocks(NODES[1], long[:3])
    log.add(node, long[:3], cluster.now)
    said = [each for _ in range(5) for each in cluster.tick(10.0)]
    assert said == [Trim(node, long[:3])]
    assert not len(log)


def test_two_nodes_that_are_both_short_of_room_keep_their_copies() -> None:
    cluster = Several("least-loaded", FULL)
    log = cluster.conductor.view.copy_log
    for index in range(14):
        prompt = keys(4 * BLOCK_TOKENS, salt=index)
        for node in NODES[:2]:
            cluster.blocks(node, prompt)
            log.add(node, prompt, cluster.now)
    assert cluster.tick(60.0) == []


@pytest.mark.parametrize("count", [1, 3])
def test_the_record_of_copies_is_bounded(count: int) -> None:
    log = CopyLog()
    run = keys(3 * BLOCK_TOKENS)
    for index in range(count):
        log.add(NODES[index], run, float(index))
    assert len(log) == 1
    (found,) = log.unused(10.0)
    for node in list(found.nodes):
        log.remove(node, found)
    assert len(log) == 0


def test_longer_prefixes_are_counted_at_powers_of_two() -> None:
    cluster = Several()
    cluster.blocks(NODES[0], keys(13 * BLOCK_TOKENS))
    hot = HotPrefixes(cluster.conductor.view.prefixes, PROFILE)
    assert len(hot) == 0
    cluster.conductor.view.hot_prefixes = hot
    cluster.report("p0", "prefill", draining=True)
    cluster.dispatch("r", 14 * BLOCK_TOKENS)
    lengths = sorted(len(each.keys) for each in hot.hottest(10, cluster.now))
    assert lengths == [1, 2, 4, 8]
