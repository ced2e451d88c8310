"""Moonlight's architecture against transformers' implementation of it, in float32."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from perigee.workers.attention.base import Span
from perigee.workers.attention.latent import LatentAttention
from perigee.workers.engine.engine import Engine
from perigee.workers.engine.kv_io import payload_views
from perigee.workers.engine.pages import PageTable
from tests import tiny_moonlight
from tests.workers.engines import BLOCK_TOKENS, engine, logits, prefill_payloads, run, run_cached, sequence

RELATIVE_ERROR = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "moonlight": {},
    "query-latent": {"q_lora_rank": 48},
    "groups": {"n_group": 4, "topk_group": 2},
    "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "all-dense": {"first_k_dense_replace": 3},
    "no-dense": {"first_k_dense_replace": 0, "n_shared_experts": 1},
    "plain-rope": {"rope_interleave": False},
    "tied": {"tie_word_embeddings": True},
    "wide-values": {"v_head_dim": 80, "qk_nope_head_dim": 48},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 50000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 32,
            "beta_slow": 1,
        }
    },
}
# What DeepSeek-V2 has otherwise: a softmax, no bias for the choice, groups by their best expert, weights as they are.
SECOND: dict[str, Any] = {"version": 2, "topk_method": "greedy", "norm_topk_prob": False}
SECOND_VARIANTS: dict[str, dict[str, Any]] = {
    "v2": SECOND,
    "v2-query-latent": SECOND | {"q_lora_rank": 48},
    "v2-groups": SECOND | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "v2-yarn": SECOND | VARIANTS["yarn"],
}

LENGTHS = (1, 31, 33, 100)
NUM_OUTPUTS = 6


@dataclass(frozen=True, slots=True)
class Pair:
    """One checkpoint, as we and as transformers run it."""

    directory: Path
    engine: Engine
    reference: PreTrainedModel


def load(directory: Path, **changes: Any) -> Pair:
    tiny_moonlight.write(directory, **changes)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return Pair(directory, engine(directory, kv_tokens=1024), reference)


@pytest.fixture(scope="module")
def moonlight(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load(tmp_path_factory.mktemp("moonlight"))


def prompt(length: int) -> list[int]:
    ids = torch.randint(
        2, tiny_moonlight.BASE["vocab_size"], (length,), generator=torch.Generator().manual_seed(length)
    )
    return [int(token) for token in ids]


PROMPTS = [prompt(length) for length in LENGTHS]


@torch.inference_mode()
def assert_exact(pair: Pair, max_batched_tokens: int) -> None:
    """Logits at every position of a batch, and the greedy tokens after them, are those of transformers."""
    batcher = pair.engine.batcher
    batcher.limits = replace(batcher.limits, max_batched_tokens=max_batched_tokens)
    asked = [sequence(one, str(index), max_tokens=NUM_OUTPUTS) for index, one in enumerate(PROMPTS)]
    for one, (token_ids, computed) in zip(PROMPTS, logits(pair.engine, asked), strict=True):
        expected = pair.reference(torch.tensor([token_ids[:-1]])).logits[0]
        assert len(token_ids) == len(one) + NUM_OUTPUTS
        assert relative_error(computed, expected) < RELATIVE_ERROR
        assert token_ids[len(one) :] == expected[len(one) - 1 :].argmax(dim=-1).tolist()


def relative_error(computed: Tensor, expected: Tensor) -> float:
    assert computed.shape == expected.shape
    return float((computed - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", [*VARIANTS, *SECOND_VARIANTS])
def test_logits_and_greedy_tokens_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    pair = load(tmp_path, **(VARIANTS | SECOND_VARIANTS)[variant])
    for max_batched_tokens in (256, 24):
        assert_exact(pair, max_batched_tokens)


@pytest.mark.parametrize("max_batched_tokens", [256, 24, 5, 1])
@pytest.mark.parametrize("absorbs", [True, False], ids=["absorbed", "expanded"])
def test_both_forms_of_attention_are_exact_however_prompts_are_cut(
    moonlight: Pair, max_batched_tokens: int, absorbs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentAttention, "absorbs", lambda self, span: absorbs)
    assert_exact(moonlight, max_batched_tokens)


def test_the_form_that_takes_fewer_operations_is_taken(moonlight: Pair) -> None:
    attention = moonlight.engine.runner.model.layers[0].attention.backend
    pages = PageTable(tuple(range(128)), 32)

    def absorbs(length: int, context: int) -> bool:
        return bool(attention.absorbs(Span(0, length, context - length, context, pages, torch.float32)))

    assert absorbs(1, 2) and absorbs(8, 4096)
    assert not absorbs(256, 256) and not absorbs(256, 1024)


def test_greedy_output_is_what_transformers_generates(moonlight: Pair) -> None:
    outputs = run(moonlight.engine, [sequence(one, str(index)) for index, one in enumerate(PROMPTS)])
    for one, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([one])
        generated = moonlight.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(output),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output == generated[0, len(one) :].tolist()


def test_blocks_that_another_engine_computed_give_the_same_tokens(moonlight: Pair) -> None:
    other = engine(moonlight.directory, kv_tokens=1024)
    expected = [run(moonlight.engine, [sequence(one)])[0] for one in PROMPTS]
    assert [run_cached(moonlight.engine, other, sequence(one)) for one in PROMPTS] == expected
    assert other.totals.computed_prompt_tokens == len(PROMPTS)  # the last of each, for its logits


@torch.inference_mode()
def test_a_block_holds_normalised_latents_and_rotated_keys_and_their_mean(moonlight: Pair) -> None:
    token_ids = prompt(100)
    cached = moonlight.reference(torch.tensor([token_ids]), use_cache=True).past_key_values
    # transformers caches the same: the latent under the name of the keys, the rotated key under that of the values.
    expected = torch.stack([torch.cat([layer.keys[0, 0], layer.values[0, 0]], dim=-1) for layer in cached.layers])
    layout = moonlight.engine.runner.pool.layout
    for index, payload in enumerate(prefill_payloads(moonlight.engine, sequence(token_ids))):
        tensors, centroids = payload_views(payload, layout)
        own = expected[:, index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        assert relative_error(tensors[:, 0, : own.shape[1]], own) < RELATIVE_ERROR
        assert relative_error(centroids, own.mean(dim=1)) < RELATIVE_ERROR
