"""Sampling: what is cut, what is penalised, and that randomness depends on the request alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from perigee.workers.engine.sampler import Draw, sample, uniform
from perigee.workers.engine.sequence import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(outputs: list[int] | None = None, seed: int = 1, choice: int = 0, **sampling: object) -> Draw:
    return Draw(Sampling(**sampling), seed, choice, outputs or [], frozenset({0}))  # type: ignore[arg-type]


def tokens(count: int, **sampling: object) -> list[int]:
    """Tokens at `count` output positions of one request."""
    draws = [draw(outputs=[5] * position, **sampling) for position in range(count)]
    return [token.token for token in sample(LOGITS.expand(count, -1), draws)]


def test_greedy_takes_the_likeliest() -> None:
    assert tokens(3, temperature=0.0) == [0, 0, 0]


def test_frequencies_follow_the_distribution() -> None:
    drawn = torch.tensor(tokens(4000, temperature=1.0))
    observed = torch.bincount(drawn, minlength=6) / len(drawn)
    assert torch.allclose(observed, torch.softmax(LOGITS, 0), atol=0.03)


def test_temperature_sharpens() -> None:
    assert tokens(500, temperature=0.2).count(0) > tokens(500, temperature=2.0).count(0)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(tokens(500, temperature=3.0, top_k=2)) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_holds_the_mass() -> None:
    # softmax: 0.54 0.20 0.12 0.07 ...: 0.6 takes the first two, 0.5 the first alone.
    assert set(tokens(500, temperature=1.0, top_p=0.6)) == {0, 1}
    assert set(tokens(100, temperature=1.0, top_p=0.5)) == {0}


def test_top_p_beyond_the_guess_sorts_everything() -> None:
    nearly_flat = torch.linspace(0, -0.5, 5000)[None]
    drawn = [sample(nearly_flat, [draw(seed=s, temperature=1.0, top_p=0.99)])[0].token for s in range(40)]
    assert max(drawn) > 2000


def test_a_row_draws_the_same_in_any_batch() -> None:
    mine = draw(seed=11, temperature=1.0, top_p=0.9)
    alone = sample(LOGITS[None], [mine])
    others = [draw(seed=seed, temperature=0.7) for seed in range(5)]
    batched = sample(LOGITS.expand(6, -1), [*others[:3], mine, *others[3:]])
    assert batched[3] == alone[0]


def test_choices_and_positions_draw_differently() -> None:
    assert len({uniform(3, choice, position) for choice in range(10) for position in range(10)}) == 100


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_uniform_is_in_the_unit_interval_and_repeats(seed: int, choice: int, position: int) -> None:
    value = uniform(seed, choice, position)
    assert 0 <= value < 1 and value == uniform(seed, choice, position)


def test_no_end_before_min_tokens() -> None:
    assert sample(LOGITS[None], [draw(temperature=0.0, min_tokens=1)])[0].token == 1
    assert sample(LOGITS[None], [draw(temperature=0.0, min_tokens=1, stop_token_ids=(1,))])[0].token == 2
    assert sample(LOGITS[None], [draw(outputs=[1], temperature=0.0, min_tokens=1)])[0].token == 0


def test_penalties_count_the_output() -> None:
    assert sample(LOGITS[None], [draw(outputs=[0], temperature=0.0, presence_penalty=1.5)])[0].token == 1
    assert sample(LOGITS[None], [draw(outputs=[0], temperature=0.0, frequency_penalty=0.6)])[0].token == 0
    assert sample(LOGITS[None], [draw(outputs=[0, 0], temperature=0.0, frequency_penalty=0.6)])[0].token == 1


def test_logprobs_are_of_the_models_own_distribution() -> None:
    (token,) = sample(LOGITS[None], [draw(temperature=0.1, top_k=1, logprobs=2)])
    expected = torch.log_softmax(LOGITS, 0)
    assert token.logprob is not None and abs(token.logprob - float(expected[0])) < 1e-6
    assert [t for t, _ in token.top_logprobs] == [0, 1]


def test_no_alternatives_still_gives_the_tokens_own_logprob() -> None:
    (token,) = sample(LOGITS[None], [draw(temperature=0.0, logprobs=0)])
    assert token.logprob is not None and token.top_logprobs == ()
