"""The limits beside the figures, on a machine and a model whose limits can be worked out by hand."""

import json
from pathlib import Path

import pytest

from perigee.bench.limits import limits, step_s, weight_bytes
from perigee.bench.machine import MachineRates
from perigee.bench.workload import DECODE_PROMPT_TOKENS, Sizes, decode_tokens
from perigee.workers.model.config import ModelConfig, load_config

SLOW_MEMORY = MachineRates(matmul_flops_per_s=1e18, memory_bytes_per_s=1e6)
SLOW_PRODUCTS = MachineRates(matmul_flops_per_s=1e9, memory_bytes_per_s=1e18)

MOONLIGHT = {
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 1024,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> ModelConfig:
    return load_config(tiny_llama)


@pytest.fixture
def moonlight(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(MOONLIGHT))
    return load_config(tmp_path)


def kv_bytes(model: ModelConfig, streams: int) -> int:
    context = DECODE_PROMPT_TOKENS + decode_tokens(streams) // 2
    return streams * context * model.payload_layout("float32", block_tokens=1).tensor_bytes


def test_prefill_is_limited_by_its_operations(llama: ModelConfig) -> None:
    limit = limits(llama, SLOW_PRODUCTS, "float32", Sizes((100,), ()))
    assert limit.prefill == {100: pytest.approx(100 / (llama.prefill_flops(100) / 1e9))}


def test_decode_reads_all_weights_once_and_each_streams_kvcache(llama: ModelConfig) -> None:
    for streams in (1, 8):
        expected = (llama.step_weights(streams) * 4 + kv_bytes(llama, streams)) / 1e6
        assert step_s(llama, SLOW_MEMORY, "float32", streams) == pytest.approx(expected)
        decode = limits(llama, SLOW_MEMORY, "float32", Sizes((), (streams,))).decode
        assert decode == {streams: pytest.approx(streams / expected)}


def test_a_step_of_more_streams_reads_more_experts(moonlight: ModelConfig) -> None:
    def weights(streams: int) -> float:
        return step_s(moonlight, SLOW_MEMORY, "float32", streams) * 1e6 - kv_bytes(moonlight, streams)

    assert weights(1) < weights(4) < weights(64)
    assert weights(64) == pytest.approx(weight_bytes(moonlight, "float32"), rel=1e-3)


def test_where_products_are_slow_more_streams_are_not_faster(llama: ModelConfig) -> None:
    decode = limits(llama, SLOW_PRODUCTS, "float32", Sizes((), (1, 8))).decode
    assert decode[8] == pytest.approx(decode[1])


def test_prompts_included_decode_is_slower(llama: ModelConfig) -> None:
    limit = limits(llama, SLOW_PRODUCTS, "float32", Sizes((), (1, 8)))
    assert all(limit.decode_with_prompts[n] < limit.decode[n] for n in (1, 8))


def test_the_best_rates_of_several_rounds_make_the_limit() -> None:
    assert MachineRates.best([MachineRates(1, 4), MachineRates(3, 2)]) == MachineRates(3, 4)
