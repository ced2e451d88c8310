"""Checkpoints of DeepSeek-V3's architecture, written for llama.cpp. That llama.cpp computes the same with them as
transformers does was seen with its programs, which the tests have not."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from perigee.bench.errors import NotConvertible
from perigee.bench.peers.gguf_deepseek import Form, write_gguf
from perigee.workers.model.config import load_config
from perigee.workers.model.moonlight_config import MoonlightConfig

HEADS, NOPE, ROPE, VALUE, RANK, EXPERTS = 2, 8, 4, 6, 16, 4


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    config: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**config | changes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MoonlightConfig:
    config = load_config(checkpoint)
    assert isinstance(config, MoonlightConfig)
    return config


@pytest.fixture(params=["expanded", "absorbed"])
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


def tensors(reader: gguf.GGUFReader) -> dict[str, npt.NDArray[np.float32]]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def written(checkpoint: Path, model: MoonlightConfig, form: Form, file: Path) -> gguf.GGUFReader:
    write_gguf(checkpoint, model, file, form, "float32")
    return gguf.GGUFReader(file)


def test_every_weight_is_there_once(checkpoint: Path, model: MoonlightConfig, form: Form, tmp_path: Path) -> None:
    reader = written(checkpoint, model, form, tmp_path / "m.gguf")
    source = load_file(checkpoint / "model.safetensors")
    assert sum(int(t.n_elements) for t in reader.tensors) == sum(t.numel() for t in source.values())
    assert sum(float(t.sum()) for t in tensors(reader).values()) == pytest.approx(
        sum(float(t.double().sum()) for t in source.values()), abs=1e-2
    )


def test_experts_lie_in_one_tensor_in_their_order(checkpoint: Path, model: MoonlightConfig, tmp_path: Path) -> None:
    found = tensors(written(checkpoint, model, "expanded", tmp_path / "m.gguf"))["blk.1.ffn_down_exps.weight"]
    source = load_file(checkpoint / "model.safetensors")
    for expert in range(EXPERTS):
        expected = source[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        np.testing.assert_array_equal(found[expert], expected.numpy())


def test_the_absorbed_factors_are_those_of_the_expansion(
    checkpoint: Path, model: MoonlightConfig, tmp_path: Path
) -> None:
    absorbed = tensors(written(checkpoint, model, "absorbed", tmp_path / "absorbed.gguf"))
    expanded = tensors(written(checkpoint, model, "expanded", tmp_path / "expanded.gguf"))
    latent = np.random.default_rng(0).standard_normal(RANK).astype(np.float32)
    heads = (expanded["blk.0.attn_kv_b.weight"] @ latent).reshape(HEADS, NOPE + VALUE)
    keys = np.einsum("hrk,r->hk", absorbed["blk.0.attn_k_b.weight"], latent)
    values = absorbed["blk.0.attn_v_b.weight"] @ latent
    np.testing.assert_allclose(np.concatenate([keys, values], axis=1), heads, rtol=1e-4, atol=1e-6)


def test_the_metadata_says_how_attention_is_cached(checkpoint: Path, model: MoonlightConfig, tmp_path: Path) -> None:
    absorbed = written(checkpoint, model, "absorbed", tmp_path / "absorbed.gguf")
    expanded = written(checkpoint, model, "expanded", tmp_path / "expanded.gguf")
    assert absorbed.fields["deepseek2.attention.head_count_kv"].contents() == 1
    assert absorbed.fields["deepseek2.attention.key_length"].contents() == RANK + ROPE
    assert absorbed.fields["deepseek2.attention.key_length_mla"].contents() == NOPE + ROPE
    assert expanded.fields["deepseek2.attention.head_count_kv"].contents() == HEADS
    assert expanded.fields["deepseek2.attention.key_length"].contents() == NOPE + ROPE
    assert "deepseek2.attention.key_length_mla" not in expanded.fields


def test_matrices_are_in_the_dtype_that_was_asked_for(checkpoint: Path, model: MoonlightConfig, tmp_path: Path) -> None:
    write_gguf(checkpoint, model, tmp_path / "m.gguf", "absorbed", "bfloat16")
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == gguf.GGMLQuantizationType.BF16
    assert types["blk.0.attn_k_b.weight"] == gguf.GGMLQuantizationType.BF16
    assert types["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32
    assert types["blk.1.ffn_gate_inp.weight"] == gguf.GGMLQuantizationType.F32


def test_what_is_not_converted_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, n_group=2, topk_group=2)
    config = load_config(checkpoint)
    assert isinstance(config, MoonlightConfig)
    with pytest.raises(NotConvertible, match="n_group: 2 is not converted"):
        write_gguf(checkpoint, config, tmp_path / "m.gguf", "absorbed", "float32")
