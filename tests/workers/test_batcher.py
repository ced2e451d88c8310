"""Continuous batching: what is admitted, what a step holds, and how sequences end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.workers.engine.batcher import Active, Batcher, BatchLimits
from perigee.workers.engine.pages import PagePool
from perigee.workers.engine.sequence import FinishReason, Ref, Sampling, Sequence, Token

EOS = 7


def batcher(pages: int = 16, tokens: int = 8, sequences: int = 4, context: int = 64) -> Batcher:
    return Batcher(PagePool(pages, 4), BatchLimits(tokens, sequences, context), frozenset({EOS}))


def sequence(name: str, length: int, max_tokens: int = 4, **sampling: object) -> Sequence:
    return Sequence(Ref(name), tuple(range(length)), length, (), Sampling(max_tokens=max_tokens, **sampling))  # type: ignore[arg-type]


def running(batcher: Batcher, *sequences: Sequence, one_token: bool = False) -> list[Active]:
    for one in sequences:
        batcher.add(one, one_token=one_token)
    admitted = batcher.admit()
    for active in admitted:
        batcher.ready(active, 0)
    return admitted


def test_pages_for_prompt_and_all_output_are_taken_before_a_sequence_runs() -> None:
    engine = batcher(pages=4)
    (active,) = running(engine, sequence("a", 9, max_tokens=7))
    assert len(active.pages.pages) == 4 and engine.pool.num_free == 0


def test_prefill_takes_pages_for_the_prompt_alone() -> None:
    (active,) = running(batcher(), sequence("a", 9, max_tokens=40), one_token=True)
    assert len(active.pages.pages) == 3


def test_who_does_not_fit_waits_and_is_not_overtaken() -> None:
    engine = batcher(pages=4)
    running(engine, sequence("a", 8, max_tokens=4))
    assert running(engine, sequence("b", 4, max_tokens=4), sequence("c", 1, max_tokens=1)) == []
    engine.remove(Ref("a"))
    assert [active.ref.request_id for active in engine.admit()] == ["b", "c"]


def test_no_more_sequences_than_the_limit_are_active() -> None:
    admitted = running(batcher(sequences=2), *(sequence(name, 1) for name in "abc"))
    assert len(admitted) == 2


def test_decoding_goes_first_and_prompts_share_what_is_left_of_the_token_budget() -> None:
    engine = batcher(tokens=8)
    (first,) = running(engine, sequence("a", 3))
    engine.apply(engine.schedule(), [Token(1)])
    second, third = running(engine, sequence("b", 5), sequence("c", 9))
    chunks = [(chunk.active, chunk.start, chunk.length, chunk.samples) for chunk in engine.schedule()]
    assert chunks == [(first, 3, 1, True), (second, 0, 5, True), (third, 0, 2, False)]


def test_prompts_share_a_step_only_while_they_are_short_together() -> None:
    limits = BatchLimits(64, 8, 64, shared_prompt_tokens=8)
    engine = Batcher(PagePool(64, 4), limits, frozenset({EOS}))
    running(engine, *(sequence(name, length) for name, length in (("a", 20), ("b", 3), ("c", 5), ("d", 1), ("e", 4))))
    steps = []
    for _ in range(3):
        chunks = engine.schedule()
        steps.append([(chunk.active.ref.request_id, chunk.length) for chunk in chunks])
        engine.apply(chunks, [Token(1)] * len(chunks))
    # One token of a prompt is as little as a decoding sequence's, and holds up nobody.
    assert steps == [
        [("d", 1), ("a", 20)],
        [("a", 1), ("d", 1), ("b", 3), ("c", 5)],
        [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 4)],
    ]


def test_a_prompt_goes_on_where_its_last_chunk_ended() -> None:
    engine = batcher(tokens=4)
    (active,) = running(engine, sequence("a", 10))
    spans = []
    while not active.num_outputs:
        chunks = engine.schedule()
        spans += [(chunk.start, chunk.stop, chunk.samples) for chunk in chunks]
        engine.apply(chunks, [Token(1)] if chunks[-1].samples else [])
    assert spans == [(0, 4, False), (4, 8, False), (8, 10, True)]


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    engine = batcher()
    engine.add(sequence("a", 8), one_token=False)
    (active,) = engine.admit()
    engine.ready(active, 8)
    (chunk,) = engine.schedule()
    assert (chunk.start, chunk.length, active.cached) == (7, 1, 7)


def test_what_is_still_loading_is_not_scheduled() -> None:
    engine = batcher()
    engine.add(sequence("a", 8), one_token=False)
    engine.admit()
    assert engine.schedule() == [] and not engine.has_work


def test_prefill_ends_with_its_first_token() -> None:
    engine = batcher()
    running(engine, sequence("a", 3), one_token=True)
    (output,) = engine.apply(engine.schedule(), [Token(1)])
    assert output.finish_reason is FinishReason.NOT_FINISHED and not engine.has_work


def _generate(engine: Batcher, active: Active, tokens: list[int]) -> FinishReason:
    for token in tokens:
        if active.finish_reason:
            break
        engine.apply(engine.schedule(), [Token(token)])
    return active.finish_reason


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason", "outputs"),
    [
        ({"max_tokens": 3}, [1, 1, 1, 1], FinishReason.LENGTH, 3),
        ({"max_tokens": 9}, [1, EOS, 1], FinishReason.STOP, 2),
        ({"max_tokens": 3, "ignore_eos": True}, [1, EOS, 1], FinishReason.LENGTH, 3),
        ({"max_tokens": 9, "stop_token_ids": (5,)}, [1, 5, 1], FinishReason.STOP, 2),
        ({"max_tokens": 9, "stop_token_ids": (5,), "ignore_eos": True}, [EOS, 5, 1], FinishReason.STOP, 2),
    ],
)
def test_how_sequences_end(sampling: dict[str, object], tokens: list[int], reason: FinishReason, outputs: int) -> None:
    engine = batcher()
    (active,) = running(engine, sequence("a", 3, **sampling))  # type: ignore[arg-type]
    assert _generate(engine, active, tokens) is reason
    assert active.num_outputs == outputs


def test_the_context_ends_a_sequence() -> None:
    engine = batcher(context=6)
    (active,) = running(engine, sequence("a", 4, max_tokens=50))
    assert _generate(engine, active, [1] * 5) is FinishReason.LENGTH
    assert active.num_tokens == 6


def test_what_could_never_run_is_refused_with_its_numbers() -> None:
    engine = batcher(pages=2, context=20)
    assert "needs 3 pages" in (engine.refusal(sequence("a", 9), False) or "")
    assert "the context holds 20" in (engine.refusal(sequence("a", 21), True) or "")
    assert "is empty" in (engine.refusal(sequence("a", 0), True) or "")
    assert engine.refusal(sequence("a", 4, max_tokens=4), False) is None


def test_removing_frees_pages_wherever_the_sequence_stands() -> None:
    engine = batcher(pages=4)
    running(engine, sequence("a", 8, max_tokens=8))
    engine.add(sequence("b", 8), one_token=False)
    engine.remove(Ref("b"))
    engine.remove(Ref("a"))
    engine.remove(Ref("a"))
    assert engine.pool.num_free == 4 and not engine.waiting and not engine.active


def test_blocks_are_complete_when_their_last_token_is() -> None:
    engine = batcher(tokens=6)
    running(engine, sequence("a", 11))
    complete = []
    for sampled in ([], [Token(1)], [Token(1)], [Token(1)]):
        chunks = engine.schedule()
        complete.append(list(chunks[0].blocks(4)))
        engine.apply(chunks, sampled)
    # Tokens 0-5, 6-10 (the prompt's end: its partial block counts), 11 fills that block, 12 begins the next.
    assert complete == [[0], [1, 2], [2], []]


def names(admitted: list[Active]) -> list[str]:
    return [active.ref.request_id for active in admitted]


def test_the_smallest_rank_is_admitted_first_and_equals_in_order_of_arrival() -> None:
    engine = batcher(sequences=2)
    for name, rank in (("late", 9.0), ("b", 2.0), ("early", -1.0), ("c", 2.0)):
        engine.add(sequence(name, 1), one_token=False, rank=rank)
    first = engine.admit()
    for active in first:
        engine.remove(active.ref)
    assert names(first) == ["early", "b"] and names(engine.admit()) == ["c", "late"]


def test_who_is_first_by_rank_is_not_overtaken_for_being_large() -> None:
    engine = batcher(pages=4)
    running(engine, sequence("a", 8, max_tokens=4))
    engine.add(sequence("small", 1, max_tokens=1), one_token=False, rank=2.0)
    engine.add(sequence("large", 12, max_tokens=4), one_token=False, rank=1.0)
    assert engine.admit() == []
    engine.remove(Ref("a"))
    assert names(engine.admit()) == ["large"]


def test_prompts_in_progress_give_way_to_those_of_smaller_rank_but_decoding_goes_on() -> None:
    engine = batcher(tokens=4)
    (decoding,) = running(engine, sequence("decoding", 2))
    engine.apply(engine.schedule(), [Token(1)])
    (long,) = running(engine, sequence("long", 20))
    engine.apply(engine.schedule(), [Token(1)])
    engine.add(sequence("urgent", 5), one_token=False, rank=-1.0)
    (urgent,) = engine.admit()
    engine.ready(urgent, 0)
    assert [(chunk.active, chunk.start, chunk.length) for chunk in engine.schedule()] == [
        (decoding, 3, 1),
        (urgent, 0, 3),
    ]
    assert long.computed == 3


def test_just_in_time_admission_counts_only_the_prompts_that_go_first() -> None:
    limits = BatchLimits(8, 4, 64, prompts_just_in_time=True)
    engine = Batcher(PagePool(64, 4), limits, frozenset({EOS}))
    engine.add(sequence("long", 30), one_token=True, rank=5.0)
    engine.add(sequence("next", 4), one_token=True, rank=6.0)
    assert names(engine.admit()) == ["long"]
    engine.add(sequence("urgent", 4), one_token=True, rank=1.0)
    assert names(engine.admit()) == ["urgent"]


arrivals = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 7.0]), st.integers(1, 12)), max_size=12)


@settings(deadline=None, max_examples=60)
@given(arrivals=arrivals, gone=st.sets(st.integers(0, 11)), just_in_time=st.booleans())
def test_all_who_wait_are_admitted_once_and_by_rank(
    arrivals: list[tuple[float, int]], gone: set[int], just_in_time: bool
) -> None:
    engine = Batcher(PagePool(4, 4), BatchLimits(8, 3, 64, just_in_time), frozenset({EOS}))
    for number, (rank, length) in enumerate(arrivals):
        engine.add(sequence(str(number), length), one_token=True, rank=rank)
    for number in gone:
        engine.remove(Ref(str(number)))
    expected = [n for _, n in sorted((rank, n) for n, (rank, _) in enumerate(arrivals) if n not in gone)]
    admitted: list[str] = []
    finished: list[str] = []
    while engine.waiting or engine.active:
        for active in engine.admit():
            admitted.append(active.ref.request_id)
            engine.ready(active, 0)
        chunks = engine.schedule()
        assert chunks and sum(chunk.length for chunk in chunks) <= 8
        for output in engine.apply(chunks, [Token(1) for chunk in chunks if chunk.samples]):
            finished.append(output.active.ref.request_id)
            engine.remove(output.active.ref)
    assert admitted == [str(number) for number in expected]
    assert sorted(finished) == sorted(admitted) and engine.pool.num_free == 4
