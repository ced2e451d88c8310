"""A checkpoint of DeepSeek-V3's architecture as a GGUF file that llama.cpp computes with (its `deepseek2`), without a
vocabulary. Names and metadata keys are those of llama.cpp's `convert_hf_to_gguf.py`."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from perigee.bench.errors import NotConvertible
from perigee.kvstore.blocks import DType
from perigee.workers.model.moonlight_config import MoonlightConfig

# How attention is written down: with keys and values expanded to full heads, or with the expansion absorbed into query
# and output, so that all heads share the cached latent. llama.cpp computes whichever it finds.
Form = Literal["expanded", "absorbed"]
FORMS: tuple[Form, ...] = ("expanded", "absorbed")

_TOP_NAMES = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_GATING = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID}


def write_gguf(directory: Path, model: MoonlightConfig, file: Path, form: Form, dtype: DType) -> None:
    """Writes the checkpoint in `directory` to `file`. Raises NotConvertible. Never holds more than one tensor, but for
    the experts of a layer."""
    _check(model)
    writer = gguf.GGUFWriter(file, "deepseek2", use_temp_file=True)
    _write_metadata(writer, model, form)
    with ExitStack() as stack:
        weights = _Weights(directory, stack)
        for name, tensor in _tensors(weights, model, form):
            _add(writer, name, tensor, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class _Weights:
    """The tensors of a checkpoint by name, over all its shards, which `stack` closes."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        shards = [stack.enter_context(safe_open(path, "pt")) for path in sorted(directory.glob("*.safetensors"))]
        self._shards = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 (not a mapping)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._shards[name].get_tensor(name)
        return tensor


def _check(model: MoonlightConfig) -> None:
    if model.rope.kind != "default":
        raise NotConvertible(f"rope_type: {model.rope.kind!r} is not converted, only 'default'")
    if not model.interleaved_rope:
        raise NotConvertible("rope_interleave: False is not converted")
    if model.router.num_groups != 1:
        raise NotConvertible(f"n_group: {model.router.num_groups} is not converted, only 1")


def _write_metadata(writer: gguf.GGUFWriter, model: MoonlightConfig, form: Form) -> None:
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    _write_attention(writer, model, form)
    _write_experts(writer, model)


def _write_attention(writer: gguf.GGUFWriter, model: MoonlightConfig, form: Form) -> None:
    key_dim = model.nope_dim + model.rope_dim
    writer.add_head_count(model.num_heads)
    writer.add_q_lora_rank(model.q_lora_rank or 0)
    writer.add_kv_lora_rank(model.kv_lora_rank)
    writer.add_rope_dimension_count(model.rope_dim)
    writer.add_rope_freq_base(model.rope.theta)
    if form == "expanded":
        writer.add_head_count_kv(model.num_heads)
        writer.add_key_length(key_dim)
        writer.add_value_length(model.value_dim)
        return
    writer.add_head_count_kv(1)
    writer.add_key_length(model.latent_width)
    writer.add_value_length(model.kv_lora_rank)
    writer.add_key_length_mla(key_dim)
    writer.add_value_length_mla(model.value_dim)


def _write_experts(writer: gguf.GGUFWriter, model: MoonlightConfig) -> None:
    router = model.router
    writer.add_leading_dense_block_count(model.num_dense_layers)
    writer.add_expert_count(router.num_experts)
    writer.add_expert_used_count(router.experts_per_token)
    writer.add_expert_shared_count(model.num_shared_experts)
    writer.add_expert_feed_forward_length(model.moe_intermediate_size)
    writer.add_expert_weights_scale(router.scaling_factor)
    writer.add_expert_weights_norm(router.normalise)
    writer.add_expert_gating_func(_GATING[router.scoring])


def _tensors(weights: _Weights, model: MoonlightConfig, form: Form) -> Iterator[tuple[str, Tensor]]:
    """Name in GGUF and tensor, of all that the checkpoint has."""
    for name, source in _TOP_NAMES.items():
        if source in weights:
            yield f"{name}.weight", weights[source]
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for name, tensor in _layer_tensors(weights, model, form, prefix):
            yield f"blk.{layer}.{name}", tensor


def _layer_tensors(weights: _Weights, model: MoonlightConfig, form: Form, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, source in _LAYER_NAMES.items():
        if f"{prefix}.{source}.weight" in weights:
            yield f"{name}.weight", weights[f"{prefix}.{source}.weight"]
    yield from _expansion(weights[f"{prefix}.self_attn.kv_b_proj.weight"], model, form)
    bias = f"{prefix}.mlp.gate.e_score_correction_bias"
    if bias in weights:
        yield "exp_probs_b.bias", weights[bias]
    for name, source in _EXPERT_NAMES.items():
        if f"{prefix}.mlp.experts.0.{source}.weight" in weights:
            experts = (f"{prefix}.mlp.experts.{expert}.{source}.weight" for expert in range(model.router.num_experts))
            yield f"{name}.weight", torch.stack([weights[expert] for expert in experts])


def _expansion(weight: Tensor, model: MoonlightConfig, form: Form) -> Iterator[tuple[str, Tensor]]:
    """From the latent to keys and values: in one, or as the two factors that are absorbed, the keys' transposed."""
    if form == "expanded":
        yield "attn_kv_b.weight", weight
        return
    heads = weight.view(model.num_heads, model.nope_dim + model.value_dim, model.kv_lora_rank)
    yield "attn_k_b.weight", heads[:, : model.nope_dim].transpose(1, 2)
    yield "attn_v_b.weight", heads[:, model.nope_dim :]


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: DType) -> None:
    """In `dtype`, but for what llama.cpp reads in float32 only: vectors and the router."""
    if dtype == "float32" or tensor.dim() == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
        return
    plain = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, np.ascontiguousarray(plain), raw_dtype=gguf.GGMLQuantizationType.BF16)
