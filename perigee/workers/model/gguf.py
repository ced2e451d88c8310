"""GGUF to Hugging Face layout: what llama.cpp wrote, as `transformers` would have saved it.

Weights are dequantized tensor by tensor straight into the safetensors file, so that memory holds one tensor at a time.
Names, metadata keys and the permutation of q and k are those of llama.cpp's `convert_hf_to_gguf.py`.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import numpy.typing as npt

from perigee.kvstore.blocks import DTYPE_BYTES, DType
from perigee.workers.model.errors import CheckpointError
from perigee.workers.model.gguf_tokenizer import tokenizer_json

# Part of the cache's key: raise it whenever the same file would convert to something else.
CONVERTER_VERSION = 1

_SAFETENSORS_NAMES: dict[DType, str] = {"float32": "F32", "bfloat16": "BF16"}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")

Metadata = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A weight under its Hugging Face name; `heads` is set where the rows of q and k are permuted back."""

    name: str
    source: gguf.ReaderTensor
    heads: int | None

    @property
    def shape(self) -> list[int]:
        """Rows first, as in torch; GGUF has them the other way round."""
        return [int(size) for size in reversed(self.source.shape)]

    def load(self) -> npt.NDArray[np.float32]:
        """The weight, dequantized."""
        weight: npt.NDArray[np.float32] = gguf.dequantize(self.source.data, self.source.tensor_type)
        return weight if self.heads is None else _half_split(weight, self.heads)


class Reader(gguf.GGUFReader):
    """Reads tens of thousands of vocabulary entries ten times faster: each slice of a memmap is a costly object, each
    slice of a plain array over the same memory is not.
    """

    @property  # type: ignore[override]  # a plain array where the library declares a memmap
    def data(self) -> npt.NDArray[np.uint8]:
        return self._plain

    @data.setter
    def data(self, mapped: npt.NDArray[np.uint8]) -> None:
        self._plain = np.asarray(mapped)


def convert(source: Path, target: Path, dtype: DType) -> None:
    """Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors into the
    existing directory `target`.

    Raises CheckpointError if `source` is no GGUF file, or of an architecture, tokenizer or feature not served.
    """
    reader = _open(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unserved(source, metadata)
    tensors = _tensors(source, reader, metadata)
    documents = {
        "config.json": _config(metadata, tensors, dtype),
        "generation_config.json": _generation_config(metadata),
        "tokenizer.json": tokenizer_json(source, metadata),
        "tokenizer_config.json": _tokenizer_config(metadata),
    }
    for name, document in documents.items():
        (target / name).write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
    with (target / "model.safetensors").open("wb") as file:
        _write_safetensors(file, tensors, dtype)


def _open(source: Path) -> Reader:
    try:
        return Reader(source)
    except (ValueError, KeyError, IndexError) as error:
        # The reader's ways of saying that magic, version, types or offsets make no sense.
        raise CheckpointError(f"{source}: not a GGUF file that can be read: {error}") from error


def _refuse_unserved(source: Path, metadata: Metadata) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{source}: architecture {architecture!r} is not served from GGUF, only 'llama' is")
    if experts := metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{source}: llama.expert_count is {experts}; only dense models are served from GGUF")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{source}: llama.rope.scaling.type is {scaling!r}; only 'none' is served from GGUF")


def _tensors(source: Path, reader: Reader, metadata: Metadata) -> list[_Tensor]:
    heads = {"attn_q": _heads(metadata), "attn_k": _kv_heads(metadata)}
    tensors = []
    for tensor in reader.tensors:
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        if tensor.name in _TOP_NAMES:
            tensors.append(_Tensor(_TOP_NAMES[tensor.name], tensor, None))
        elif match and match[2] in _LAYER_NAMES:
            name = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
            tensors.append(_Tensor(name, tensor, heads.get(match[2])))
        else:
            raise CheckpointError(f"{source}: tensor {tensor.name!r} has no place in a Llama model as it is served")
    _refuse_incomplete(source, metadata, {tensor.name for tensor in tensors})
    return tensors


def _refuse_incomplete(source: Path, metadata: Metadata, names: set[str]) -> None:
    wanted = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(metadata["llama.block_count"]):
        wanted |= {f"model.layers.{layer}.{name}.weight" for name in _LAYER_NAMES.values()}
    if missing := sorted(wanted - names):
        raise CheckpointError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]!r}")


def _heads(metadata: Metadata) -> int:
    return int(metadata["llama.attention.head_count"])


def _kv_heads(metadata: Metadata) -> int:
    return int(metadata.get("llama.attention.head_count_kv", _heads(metadata)))


def _half_split(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows from llama.cpp's order, where the two elements that a rotation mixes are neighbours, to Hugging Face's,
    where they are half a head apart. `weight`: [heads * head_dim, hidden].
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # [heads, head_dim / 2, 2, hidden]
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(metadata: Metadata, tensors: list[_Tensor], dtype: DType) -> dict[str, Any]:
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    hidden_size = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": _heads(metadata),
        "num_key_value_heads": _kv_heads(metadata),
        "head_dim": metadata.get("llama.attention.key_length", hidden_size // _heads(metadata)),
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10_000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "torch_dtype": dtype,
        **_generation_config(metadata),
    }


def _shortest(value: float) -> float:
    """The decimal that was meant: GGUF keeps 1e-05 as the float32 nearest to it, which is not the nearest double."""
    return float(str(np.float32(value)))


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id", eos)
    eos_ids = sorted({token for token in (eos, end_of_turn) if token is not None})
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        **{key: tokens[token] for key, token in ids.items() if token is not None},
        **({"chat_template": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}),
    }


def _write_safetensors(file: IO[bytes], tensors: list[_Tensor], dtype: DType) -> None:
    """Length of the header as u64, the header as JSON, then the tensors: https://huggingface.co/docs/safetensors.
    Written by hand because the library wants all tensors in memory at once.
    """
    header = json.dumps(dict(_header_entries(tensors, dtype))).encode()
    header += b" " * (-len(header) % 8)  # the data starts aligned
    file.write(struct.pack("<Q", len(header)) + header)
    for tensor in tensors:
        file.write(_encode(tensor.load(), dtype))


def _header_entries(tensors: list[_Tensor], dtype: DType) -> Iterator[tuple[str, Any]]:
    yield "__metadata__", {"format": "pt"}
    end = 0
    for tensor in tensors:
        start, end = end, end + int(tensor.source.n_elements) * DTYPE_BYTES[dtype]
        yield (
            tensor.name,
            {
                "dtype": _SAFETENSORS_NAMES[dtype],
                "shape": tensor.shape,
                "data_offsets": [start, end],
            },
        )


def _encode(weight: npt.NDArray[np.float32], dtype: DType) -> bytes:
    """Little-endian; bfloat16 is the upper half of a float32, rounded to the nearest, ties to even."""
    if dtype == "float32":
        return weight.astype("<f4", copy=False).tobytes()
    bits = np.ascontiguousarray(weight).view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype("<u2").tobytes()
