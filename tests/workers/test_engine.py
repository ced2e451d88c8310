"""The engine against transformers: the same tokens, however the work is cut."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from perigee.workers.engine.engine import Engine
from perigee.workers.engine.sequence import FinishReason
from perigee.workers.model.errors import UnsupportedModel
from tests.workers.engines import engine, prefill_payloads, run, run_cached, sequence

LENGTHS = [1, 5, 31, 32, 33, 64, 100, 257, 640]


def prompt(length: int, vocab_size: int, salt: int) -> list[int]:
    generator = torch.Generator().manual_seed(salt)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Engine:
    return engine(tiny_llama, kv_tokens=32768, max_batched_tokens=4096)


@pytest.fixture(scope="module")
def prompts(tiny: Engine) -> list[list[int]]:
    return [prompt(length, tiny.runner.model.config.vocab_size, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers, each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    outputs = []
    for one in prompts:
        ids = torch.tensor([one])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(generated[0, len(one) :].tolist())
    return outputs


def test_alone(tiny: Engine, prompts: list[list[int]], reference: list[list[int]]) -> None:
    assert [run(tiny, [sequence(one)])[0] for one in prompts] == reference


def test_batched(tiny: Engine, prompts: list[list[int]], reference: list[list[int]]) -> None:
    assert run(tiny, [sequence(one, str(i)) for i, one in enumerate(prompts)]) == reference


def test_chunked_and_batched(tiny_llama: Path, prompts: list[list[int]], reference: list[list[int]]) -> None:
    chunked = engine(tiny_llama, kv_tokens=4096, max_batched_tokens=48)
    assert run(chunked, [sequence(one, str(i)) for i, one in enumerate(prompts)]) == reference


def test_in_scattered_pages(tiny: Engine, prompts: list[list[int]], reference: list[list[int]]) -> None:
    pool = tiny.batcher.pool
    tables = [pool.allocate(1) for _ in range(pool.num_free)]
    for table in tables[::2]:
        assert table
        pool.free(table)
    assert run(tiny, [sequence(prompts[-1])]) == [reference[-1]]
    for table in tables[1::2]:
        assert table
        pool.free(table)


def test_from_blocks_that_another_engine_computed(
    tiny: Engine, tiny_llama: Path, prompts: list[list[int]], reference: list[list[int]]
) -> None:
    other = engine(tiny_llama, kv_tokens=4096)
    assert [run_cached(tiny, other, sequence(one)) for one in prompts] == reference
    # Each prompt's last token is computed for its logits, and no other.
    assert other.totals.computed_prompt_tokens == len(prompts)


def test_going_on_from_a_longer_sequence_changes_nothing(tiny: Engine, prompts: list[list[int]]) -> None:
    """What a front end does after a failure: the same request again, with the tokens received so far."""
    one = sequence(prompts[4], temperature=1.0, top_p=0.9, max_tokens=20)
    (whole,) = run(tiny, [one])
    longer = type(one)(one.ref, one.token_ids + tuple(whole[:7]), one.prompt_len, (), one.sampling, one.seed)
    assert run(tiny, [longer]) == [whole]


def test_a_seed_decides_alone_whatever_else_is_in_the_batch(tiny: Engine, prompts: list[list[int]]) -> None:
    seeded = [sequence(one, str(i), temperature=0.8, top_k=50) for i, one in enumerate(prompts)]
    assert run(tiny, seeded) == [run(tiny, [one])[0] for one in seeded]


def test_choices_of_a_prompt_differ_by_their_draw_not_by_their_name(tiny: Engine, prompts: list[list[int]]) -> None:
    one = sequence(prompts[1], temperature=1.0)
    renamed = dataclasses.replace(one, ref=dataclasses.replace(one.ref, choice=7))
    other = dataclasses.replace(one, ref=dataclasses.replace(one.ref, choice=8), draw=1)
    first, same, different = run(tiny, [one, renamed, other])
    assert first == same != different


def test_logprobs_are_those_of_transformers(tiny: Engine, tiny_llama: Path, prompts: list[list[int]]) -> None:
    tiny.batcher.add(sequence(prompts[3], logprobs=3, max_tokens=1), one_token=False)
    (active,) = tiny.batcher.admit()
    tiny.ready(active, 0)
    result = tiny.step()
    tiny.batcher.remove(active.ref)
    assert result is not None and active.finish_reason is FinishReason.LENGTH
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompts[3]])).logits[0, -1], -1)
    for token, logprob in result.outputs[0].token.top_logprobs:
        assert abs(logprob - float(expected[token])) < 1e-4


def test_a_payload_with_a_foreign_header_is_refused(tiny: Engine, prompts: list[list[int]]) -> None:
    (first, *_) = prefill_payloads(tiny, sequence(prompts[3]))
    first[:4] = b"NOPE"
    tiny.batcher.add(sequence(prompts[3]), one_token=False)
    (active,) = tiny.batcher.admit()
    with pytest.raises(ValueError, match="not a payload header"):
        tiny.load_blocks(active, [(0, first)])
    tiny.batcher.remove(active.ref)


def test_a_context_beyond_the_models_own_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"--max-context: 1000000: this model has \d+ positions"):
        engine(tiny_llama, max_context=1_000_000)
