"""Steps in a row, counted and timed at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.replay.simulator.timing import Run, run_of, step_s
from perigee.scheduler.cost import CostProfile
from perigee.workers.engine.batcher import Active, Batcher, BatchLimits, Chunk
from perigee.workers.engine.pages import PagePool
from perigee.workers.engine.sequence import Ref, Sampling, Sequence, Token

PROFILE = CostProfile(step_experts_s=0.02, step_expert_share=0.1)


def decoding(*lengths: int) -> tuple[Batcher, list[Active]]:
    """Sequences of these lengths that all decode."""
    batcher = Batcher(PagePool(4096, 4), BatchLimits(1 << 14, 64, 1 << 14), frozenset())
    for index, length in enumerate(lengths):
        sequence = Sequence(Ref(str(index)), (0,) * length, length, (), Sampling(max_tokens=1000))
        batcher.add(sequence, one_token=False)
    active = batcher.admit()
    for each in active:
        batcher.ready(each, 0)
    batcher.apply(batcher.schedule(), [Token(0)] * len(lengths))
    return batcher, active


Lengths = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(Lengths, st.integers(1, 40))
def test_advancing_by_n_steps_is_n_single_steps(lengths: list[int], steps: int) -> None:
    at_once, some = decoding(*lengths)
    one_by_one, others = decoding(*lengths)
    following = at_once.advance(at_once.schedule(), steps, 0)
    for _ in range(steps):
        one_by_one.apply(one_by_one.schedule(), [Token(0)] * len(lengths))
    assert [_state(each) for each in some] == [_state(each) for each in others]
    assert [_place(chunk) for chunk in following] == [_place(chunk) for chunk in at_once.schedule()]


def _state(active: Active) -> tuple[object, ...]:
    return active.ref, active.computed, active.outputs, active.is_ready, active.finish_reason


def _place(chunk: Chunk) -> tuple[object, ...]:
    return chunk.active.ref, chunk.start, chunk.length, chunk.samples


@settings(deadline=None, max_examples=50)
@given(Lengths, st.integers(1, 40))
def test_a_run_takes_as_long_as_its_steps_one_by_one(lengths: list[int], steps: int) -> None:
    batcher, _ = decoding(*lengths)
    run, total_s = run_of(PROFILE, batcher.schedule()), 0.0
    for _ in range(steps):
        chunks = batcher.schedule()
        total_s += step_s(PROFILE, chunks)
        batcher.apply(chunks, [Token(0)] * len(lengths))
    assert run.elapsed_s(steps) == pytest.approx(total_s)


@settings(deadline=None)
@given(st.floats(1e-4, 1.0), st.floats(0.0, 1e-3), st.integers(1, 5000), st.floats(0.0, 0.99))
def test_the_steps_within_a_time_are_those_that_have_ended(
    first_s: float, growth_s: float, steps: int, share: float
) -> None:
    run = Run(first_s, growth_s)
    next_s = run.elapsed_s(steps + 1) - run.elapsed_s(steps)
    assert run.steps_within(run.elapsed_s(steps)) == steps
    assert run.steps_within(run.elapsed_s(steps) + share * next_s) == steps


def test_prompts_of_one_step_read_the_weights_once() -> None:
    batcher = Batcher(PagePool(64, 4), BatchLimits(64, 8, 1024), frozenset())
    for name in ("a", "b"):
        batcher.add(Sequence(Ref(name), (0,) * 10, 10, ()), one_token=True)
    for each in batcher.admit():
        batcher.ready(each, 0)
    both = step_s(PROFILE, batcher.schedule())
    assert both == pytest.approx(2 * PROFILE.prefill_s(10, 0) - PROFILE.prefill_fixed_s)
