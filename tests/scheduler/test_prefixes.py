"""Which store node holds how much of a prompt."""

import random

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.ids import NodeId
from perigee.scheduler.prefixes import PrefixIndex
from tests.scheduler.cluster import keys

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
PROMPT = keys(32 * 10)


def stored(*blocks: BlockKey, tier: Tier = Tier.DRAM) -> list[BlockEvent]:
    return [BlockEvent(True, key, tier) for key in blocks]


def removed(*blocks: BlockKey, tier: Tier = Tier.DRAM) -> list[BlockEvent]:
    return [BlockEvent(False, key, tier) for key in blocks]


def test_an_empty_index_knows_no_node() -> None:
    assert PrefixIndex().match(PROMPT) == {}


def test_each_node_has_its_own_longest_prefix() -> None:
    index = PrefixIndex()
    index.apply(A, stored(*PROMPT[:7]))
    index.apply(B, stored(*PROMPT[:3]))
    index.apply(C, stored(*PROMPT))
    assert index.match(PROMPT) == {A: 7, B: 3, C: 10}


def test_blocks_after_a_hole_do_not_count() -> None:
    index = PrefixIndex()
    index.apply(A, stored(*PROMPT[:3], *PROMPT[4:]))
    index.apply(B, stored(*PROMPT[1:]))
    assert index.match(PROMPT) == {A: 3, B: 0}


def test_a_removed_block_ends_the_prefix() -> None:
    index = PrefixIndex()
    index.apply(A, stored(*PROMPT) + removed(PROMPT[5]))
    assert index.match(PROMPT) == {A: 5}


def test_a_block_that_moves_between_tiers_stays_held_until_it_leaves_both() -> None:
    index = PrefixIndex()
    index.apply(A, stored(*PROMPT))
    index.apply(A, stored(PROMPT[2], tier=Tier.SSD) + removed(PROMPT[2]))
    assert index.match(PROMPT) == {A: 10}
    index.apply(A, removed(PROMPT[2], tier=Tier.SSD))
    assert index.match(PROMPT) == {A: 2}


def test_nodes_do_not_touch_each_others_blocks() -> None:
    index = PrefixIndex()
    index.apply(A, stored(*PROMPT))
    index.apply(B, removed(*PROMPT) + stored(*PROMPT[:1]) + removed(*PROMPT[:1]))
    assert index.match(PROMPT) == {A: 10, B: 0}


def test_a_forgotten_node_leaves_nothing_and_its_place_is_taken_by_the_next() -> None:
    index = PrefixIndex()
    index.apply(A, stored(*PROMPT))
    index.apply(B, stored(*PROMPT[:2]))
    index.forget(A)
    index.apply(C, stored(PROMPT[0]))
    assert index.match(PROMPT) == {B: 2, C: 1}
    index.forget(B)
    index.forget(C)
    assert len(index) == 0


def test_removing_all_that_was_stored_empties_the_index() -> None:
    index = PrefixIndex()
    for node in (A, B):
        index.apply(node, stored(*PROMPT))
    for node in (A, B):
        index.apply(node, removed(*PROMPT))
    assert len(index) == 0


def test_it_agrees_with_a_set_for_each_node() -> None:
    chance = random.Random(7)
    index = PrefixIndex()
    reference: dict[NodeId, set[BlockKey]] = {A: set(), B: set(), C: set()}
    prompts = [keys(32 * 6, salt) for salt in range(3)]
    for _ in range(2000):
        node, key = chance.choice([A, B, C]), chance.choice(chance.choice(prompts))
        is_stored = chance.random() < 0.7
        index.apply(node, [BlockEvent(is_stored, key)])
        (reference[node].add if is_stored else reference[node].discard)(key)
        for prompt in prompts:
            for known, length in index.match(prompt).items():
                holes = [i for i, each in enumerate(prompt) if each not in reference[known]]
                assert length == (holes[0] if holes else len(prompt))
