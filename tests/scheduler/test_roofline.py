"""Rooflines, beside figures computed by hand and those of the models' own classes."""

from dataclasses import replace

import numpy as np
import pytest

from perigee.scheduler.cost.hardware import A800_80G, H100_80G, H800_80G, HARDWARE, Hardware, cpu
from perigee.scheduler.cost.model_shape import LLAMA3_70B, MODELS, MOONLIGHT_16B_A3B, ModelShape
from perigee.scheduler.cost.roofline import kv_capacity_tokens, roofline
from perigee.scheduler.errors import InvalidProfile
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.llama_config import LlamaConfig
from perigee.workers.model.moonlight_config import MoonlightConfig
from tests import moonlight_16b

LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}
# As a machine would be whose every part reaches its peak at once.
IDEAL_A800 = replace(
    A800_80G,
    compute_efficiency=1.0,
    attention_efficiency=1.0,
    memory_efficiency=1.0,
    allreduce_bytes_per_s=1e18,
    allreduce_latency_s=0.0,
    step_overhead_s=0.0,
)

BOTH = pytest.mark.parametrize(
    ("shape", "model"),
    [
        (ModelShape.from_config(LLAMA), LlamaConfig.from_json(LLAMA)),
        (MOONLIGHT_16B_A3B, MoonlightConfig.from_json(moonlight_16b.CONFIG | {"vocab_size": 163840})),
    ],
    ids=["llama", "moonlight"],
)
EVERY_MODEL = pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
EVERY_HARDWARE = pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)


@BOTH
def test_a_shape_counts_the_weights_of_a_step_as_the_model_does(shape: ModelShape, model: ModelConfig) -> None:
    for batch in (1, 8, 1 << 20):
        experts = shape.expert_weights * (1 - (1 - shape.expert_share) ** batch)
        assert shape.shared_weights + shape.head_weights + experts == pytest.approx(model.step_weights(batch))


@BOTH
def test_a_shape_counts_the_operations_of_a_prompt_as_the_model_does(shape: ModelShape, model: ModelConfig) -> None:
    for tokens in (100, 10_000):
        products = 2 * tokens * shape.active_weights + 2 * shape.head_weights
        assert products + shape.pair_flops * tokens**2 / 2 == pytest.approx(model.prefill_flops(tokens))


@BOTH
def test_a_shape_counts_the_operations_of_a_decoded_token_as_the_model_does(
    shape: ModelShape, model: ModelConfig
) -> None:
    assert shape.context_flops * 1000 == pytest.approx(model.decode_flops(1000) - model.decode_flops(0))


@BOTH
def test_a_shape_knows_the_size_of_a_tokens_kvcache(shape: ModelShape, model: ModelConfig) -> None:
    assert shape.kv_bytes_per_token == model.payload_layout("bfloat16", 1).tensor_bytes


def test_the_published_models_have_their_published_sizes() -> None:
    assert LLAMA3_70B.total_bytes / 2 == pytest.approx(70.55e9, rel=0.001)
    assert MOONLIGHT_16B_A3B.total_bytes / 2 == pytest.approx(15.96e9, rel=0.001)
    assert MOONLIGHT_16B_A3B.active_weights + 2 * MOONLIGHT_16B_A3B.head_weights == pytest.approx(2.9e9, rel=0.05)
    assert LLAMA3_70B.kv_bytes_per_token * 131072 == 40 << 30  # 40 GiB for 128k tokens


def test_a_model_of_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(InvalidProfile, match=r"model_type: is 'gpt2', allowed are llama, deepseek_v2, deepseek_v3"):
        ModelShape.from_config({"model_type": "gpt2"})
    with pytest.raises(InvalidProfile, match=r"config.json: vocab_size: is missing"):
        ModelShape.from_config({key: value for key, value in LLAMA.items() if key != "vocab_size"})


def test_a_prompt_on_an_ideal_machine_takes_its_operations_at_peak() -> None:
    profile = roofline(LLAMA3_70B, IDEAL_A800)
    flops = 2 * 68.45e9 * 8192 + 4 * 80 * 64 * 128 * 8192**2 / 2
    weights_s = 139e9 / (8 * 2.039e12)
    assert profile.prefill_s(8192, 0) == pytest.approx(flops / (8 * 312e12) + weights_s, rel=0.001)


def test_reuse_pays_from_the_bandwidth_on_that_the_mooncake_paper_gives() -> None:
    """FAST '25: of a prefix of 8192 tokens, 6 GB/s on eight A800s, 19 GB/s on eight H800s."""
    prefix_bytes = 8192 * LLAMA3_70B.kv_bytes_per_token
    for hardware, gigabytes_per_s in ((IDEAL_A800, 6), (replace(IDEAL_A800, flops_per_s=989e12), 19)):
        computing_s = roofline(LLAMA3_70B, hardware).prefill_s(8192, 0)
        assert prefix_bytes / computing_s / 1e9 == pytest.approx(gigabytes_per_s, rel=0.2)


def test_a_step_on_an_ideal_machine_takes_its_bytes_at_peak() -> None:
    profile = roofline(LLAMA3_70B, IDEAL_A800)
    kv_bytes = 32 * 4096 * 327680
    step_s = profile.step_s(32, 32 * 4096) - 32 * profile.step_sequence_s
    assert step_s == pytest.approx((139e9 + kv_bytes) / (8 * 2.039e12), rel=0.001)


def test_llama3_70b_on_eight_a800s_is_as_fast_as_one_expects() -> None:
    profile = roofline(LLAMA3_70B, A800_80G)
    assert profile.prefill_s(8192, 0) == pytest.approx(1.0, abs=0.1)  # half of the peak
    assert profile.step_s(1, 1000) == pytest.approx(0.018, abs=0.002)
    assert profile.step_s(64, 64 * 8192) == pytest.approx(0.036, abs=0.004)


def test_small_batches_of_a_mixture_of_experts_read_few_of_them() -> None:
    profile = roofline(MOONLIGHT_16B_A3B, A800_80G.with_devices(1))
    alone_s = profile.step_s(1, 0) - profile.step_fixed_s
    assert alone_s == pytest.approx(2 * 14.39e9 * 6 / 64 / (2.039e12 * 0.8), rel=0.001)
    assert profile.step_s(64, 0) - profile.step_fixed_s == pytest.approx(2 * 14.39e9 / (2.039e12 * 0.8), rel=0.01)


def test_each_device_of_a_group_keeps_the_whole_latent() -> None:
    one, eight = (roofline(MOONLIGHT_16B_A3B, A800_80G.with_devices(n)) for n in (1, 8))
    assert one.step_context_token_s == eight.step_context_token_s
    one, eight = (roofline(LLAMA3_70B, A800_80G.with_devices(n)) for n in (1, 8))
    assert one.step_context_token_s == pytest.approx(8 * eight.step_context_token_s)


@EVERY_HARDWARE
@EVERY_MODEL
def test_more_work_never_takes_less_time(shape: ModelShape, hardware: Hardware) -> None:
    profile = roofline(shape, hardware)
    tokens = np.arange(0.0, 200_000.0, 1000.0)
    batch = np.arange(0.0, 500.0)
    none = np.zeros_like
    for growing in (
        profile.prefill_s(tokens, none(tokens)),
        profile.prefill_s(none(tokens) + 100, tokens),
        profile.load_s(tokens),
        profile.transfer_s(tokens),
        profile.step_s(batch, batch * 100),
        profile.mixed_s(none(batch) + 512, none(batch), batch, batch * 100),
    ):
        assert np.all(np.diff(growing) > 0)


@EVERY_MODEL
def test_better_hardware_is_faster(shape: ModelShape) -> None:
    a800, h800, h100 = (roofline(shape, hardware) for hardware in (A800_80G, H800_80G, H100_80G))
    assert a800.prefill_s(8192, 0) > h800.prefill_s(8192, 0) > h100.prefill_s(8192, 0)
    assert a800.step_s(32, 100_000) > h800.step_s(32, 100_000) >= h100.step_s(32, 100_000)


def test_memory_that_weights_leave_free_holds_kvcache() -> None:
    assert kv_capacity_tokens(LLAMA3_70B, A800_80G) == pytest.approx((576e9 - 141.1e9) / 327680, rel=0.001)
    assert kv_capacity_tokens(LLAMA3_70B, A800_80G.with_devices(1)) == 0
    assert kv_capacity_tokens(MOONLIGHT_16B_A3B, A800_80G) == pytest.approx((576e9 - 31.9e9) / 8 / 31104, rel=0.001)


def test_a_cpu_is_bound_by_what_its_threads_do_together() -> None:
    shape = ModelShape.from_config(LLAMA)
    profile = roofline(shape, cpu(threads=2, flops_per_s=100e9, memory_bytes_per_s=10e9))
    assert profile.prefill_token_s == pytest.approx(2 * shape.active_weights / 200e9)
    weights_s = 2 * (shape.shared_weights + shape.head_weights) / 20e9
    assert profile.step_s(1, 0) == pytest.approx(2e-3 + weights_s + profile.step_sequence_s)
