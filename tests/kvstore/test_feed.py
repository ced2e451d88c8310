import pytest

from perigee.kvstore import feed as feeds
from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.feed import Feed
from perigee.kvstore.messages import BlockEvent
from tests.kvstore.keys import chain

KEYS = chain("a", 8)


def _stored(keys: list[BlockKey]) -> list[BlockEvent]:
    return [BlockEvent(True, key) for key in keys]


async def test_the_snapshot_comes_first_even_when_it_is_empty() -> None:
    messages = Feed("n", "i").subscribe([]).messages()
    first = await anext(messages)
    assert (first.node_id, first.incarnation, first.snapshot, first.first_seq, len(first.events)) == (
        "n",
        "i",
        True,
        0,
        0,
    )


async def test_messages_are_numbered_without_gaps_and_kept_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_EVENTS_PER_MESSAGE", 2)
    feed = Feed("n", "i")
    messages = feed.subscribe(_stored(KEYS[:3])).messages()
    received = [await anext(messages)]
    feed.publish(_stored(KEYS[3:5]))
    feed.publish([BlockEvent(False, KEYS[0])])
    received += [await anext(messages) for _ in range(2)]
    assert [(m.snapshot, m.first_seq, len(m.events)) for m in received] == [(True, 0, 2), (False, 2, 2), (False, 4, 2)]
    events = [event for message in received for event in message.events]
    assert [event.key for event in events] == [*KEYS[:5], KEYS[0]]
    assert [event.kind for event in events] == [pb.BlockEvent.STORED] * 5 + [pb.BlockEvent.REMOVED]


async def test_a_watcher_that_does_not_take_its_events_is_dropped_and_the_others_are_not() -> None:
    feed = Feed("n", "i", limit=3)
    slow, quick = feed.subscribe(_stored(KEYS[:2])), feed.subscribe([])
    slow_messages, quick_messages = slow.messages(), quick.messages()
    await anext(quick_messages)
    for key in KEYS[2:]:
        feed.publish(_stored([key]))
        assert len((await anext(quick_messages)).events) == 1
    assert slow.overflowed and not quick.overflowed
    assert slow._pending == []
    assert [len(message.events) async for message in slow_messages] == [0]


async def test_every_message_tells_the_number_of_slots_and_a_change_has_a_message_of_its_own() -> None:
    feed = Feed("n", "i")
    early = feed.subscribe([]).messages()
    assert (await anext(early)).num_slots == 0
    feed.resize(16)
    resized = await anext(early)
    assert (resized.snapshot, resized.first_seq, len(resized.events), resized.num_slots) == (False, 0, 0, 16)
    feed.publish(_stored(KEYS[:1]))
    changed = await anext(early)
    assert (changed.first_seq, len(changed.events), changed.num_slots) == (0, 1, 16)
    assert (await anext(feed.subscribe([]).messages())).num_slots == 16
