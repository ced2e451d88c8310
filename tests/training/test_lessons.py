"""Recall exercises, batches and stages: what is drawn, and that it is drawn again."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from perigee.training.checkpoint import save
from perigee.training.data import Corpus
from perigee.training.lessons import Lessons
from perigee.training.names import held_out_name, training_name
from perigee.training.recall import ASKED, DIGITS, PLAIN, STATED, Exercises
from perigee.training.recipe import STAGED_WARMUP_STEPS, Recipe, Shape
from perigee.training.stage import Stage
from perigee.training.staged import StagedTrainer
from perigee.training.text import make_tokenizer

FILLER = "Some text that nobody asks for, line by line. "
STAGES = (
    Stage(32, 4, 3, "block_size=8,top_k=2,full_layers=1", recall=0.75, max_facts=2),
    Stage(64, 2, 4, "", recall=0.5, max_facts=3),
)
RECIPE = Recipe(
    Shape(vocab_size=400, width=32, layers=2, heads=2, experts=4, experts_per_token=2, context=256),
    optimizer="muon",
    lr=0.01,
    weight_decay=0.1,
    sequences=4,
    steps=7,
    seed=0,
    dtype="float32",
    text_digest="none",
    stages=STAGES,
    decay_steps=3,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer([FILLER, "The pass key of What is Remember that <|im_end|>user assistant"], 400)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer) -> Corpus:
    tokens = torch.tensor(tokenizer.encode(FILLER * 400).ids)
    return Corpus(tokens[1000:], tokens[:1000])


@pytest.fixture(scope="module")
def lessons(corpus: Corpus, tokenizer: Tokenizer) -> Lessons:
    return Lessons(corpus, tokenizer, 256)


def test_each_digit_is_a_token_whatever_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" 4821").tokens[-4:] == ["4", "8", "2", "1"]
    assert tokenizer.decode(tokenizer.encode("is 48213.").ids) == "is 48213."


def test_names_for_measuring_are_never_trained_on() -> None:
    random = Random(0)
    trained = {training_name(random) for _ in range(3000)}
    assert not trained & {held_out_name(random) for _ in range(1000)}
    assert 0.1 < sum(" " not in name for name in trained) / len(trained) < 0.4


def test_nothing_is_asked_before_it_was_stated(tokenizer: Tokenizer) -> None:
    filler = tokenizer.encode(FILLER * 200).ids
    digits = {tokenizer.token_to_id(digit) for digit in "0123456789"}
    for seed in range(20):
        piece = Exercises(tokenizer).draw(Random(seed), 400, 4, lambda count: filler[:count])
        assert len(piece.tokens) == len(piece.weights) == 400
        weighed = list(zip(piece.tokens, piece.weights, strict=True))
        keys = [pair for pair in weighed if pair[0] in digits]
        stated: set[tuple[int, ...]] = set()
        for start in range(0, len(keys), DIGITS):
            key, weights = zip(*keys[start : start + DIGITS], strict=True)
            assert weights == ((ASKED if key in stated else STATED),) * DIGITS
            stated.add(key)
        assert {weight for token, weight in weighed if token not in digits} == {PLAIN}


def test_of_answers_in_other_words_every_token_counts(tokenizer: Tokenizer) -> None:
    filler = tokenizer.encode(FILLER * 200).ids
    for seed in range(10):
        piece = Exercises(tokenizer).draw(Random(seed), 400, 3, lambda count: filler[:count], answers=True)
        text = tokenizer.decode(piece.tokens)
        counted = [token for token, weight in zip(piece.tokens, piece.weights, strict=True) if weight == ASKED]
        answered = tokenizer.decode(counted)
        assert answered.count("The key for") == text.count("What is the key for") == text.count("The key for")
        assert "What" not in answered and "pass" not in answered


def test_batches_are_the_same_again_and_as_large_as_the_stage_says(lessons: Lessons) -> None:
    first, again, other = (lessons.batch(STAGES[0], 0, step) for step in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.positions, again.positions)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == (4, 33) and first.weights.shape == first.positions.shape == (4, 32)


def test_positions_rise_with_one_gap_at_most_and_stay_in_the_context(lessons: Lessons) -> None:
    gaps = 0
    for step in range(30):
        for row in lessons.batch(STAGES[0], 0, step).positions.tolist():
            assert row[0] == 0 and row[-1] < 256
            jumps = [b - a for a, b in pairwise(row) if b - a != 1]
            assert len(jumps) <= 1 and all(jump > 1 for jump in jumps)
            gaps += len(jumps)
    assert gaps > 20


def test_the_share_of_exercises_is_the_stages_in_the_mean(lessons: Lessons) -> None:
    counts = [
        int((lessons.batch(replace(STAGES[1], recall=0.3), 0, step).weights != 1).any(dim=1).sum())
        for step in range(60)
    ]
    assert set(counts) == {0, 1}
    assert 0.4 < sum(counts) / 60 < 0.8


def test_stages_follow_each_other_and_the_rate_falls_at_the_end() -> None:
    assert [RECIPE.stage_at(step).length for step in range(7)] == [32] * 3 + [64] * 4
    assert Recipe.from_json(RECIPE.as_json()) == RECIPE
    long = replace(RECIPE, steps=200, decay_steps=50)
    rates = [long.lr_at(step) for step in range(200)]
    assert rates[0] == pytest.approx(0.01 / STAGED_WARMUP_STEPS)
    assert set(rates[STAGED_WARMUP_STEPS - 1 : 151]) == {0.01}
    assert rates[-1] == pytest.approx(0.01 / 50)


def test_a_run_stopped_in_any_stage_goes_on_as_if_it_had_not_been(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    expected = StagedTrainer(RECIPE, corpus, tokenizer)
    expected.run()
    for stop in (2, 3, 5):
        stopped = StagedTrainer(RECIPE, corpus, tokenizer)
        while stopped.steps_made < stop:
            stopped.step()
        save(tmp_path, RECIPE, stopped.checkpoint())
        resumed = StagedTrainer(RECIPE, corpus, tokenizer)
        resumed.run(tmp_path, checkpoint_s=1e9)
        assert resumed.curve.training == expected.curve.training
        torch.testing.assert_close(resumed.model.weights, expected.model.weights, rtol=0, atol=0)
