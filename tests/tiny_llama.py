"""A seeded random Llama of about a million parameters with a small tokenizer, in Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 128, 4, 4, 2, 32, 384
CONTEXT = 8192
BOS, EOS, END_OF_TURN = "<|begin|>", "<|end|>", "<|turn|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|begin|>' + message['role'] + '\n' + message['content'] + '<|turn|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)

# What the tokenizer learns its merges from.
CORPUS = """
A satellite on an ellipse is fastest where it is nearest to what it circles. That point has a name for every body: for
the Earth it is the perigee, for the Sun the perihelion, for the Moon the perilune. Half an orbit later it is slowest,
and there it spends most of its time. Whoever wants to raise the far end of an orbit burns the engine at the near end,
because a change of speed does the most work where the speed is greatest. Two short burns can be cheaper than one long
one, and a flyby can be cheaper than both: the planet's own motion is lent to the spacecraft and never missed. What
comes back from such a voyage is a stream of numbers, 8192 bits at a time, and each of them has to wait for its turn.
The ground station keeps what it has seen before and asks only for what is new, so that the same picture, sent twice,
costs once. One antenna listens while another speaks; neither waits for the other, and the plan says who does what.
"""


def write(directory: Path, seed: int = 0) -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and what belongs to them; returns `directory`."""
    tokenizer = _tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in (BOS, EOS, END_OF_TURN)}
    special = {"bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[END_OF_TURN]]}
    config = _config(tokenizer.get_vocab_size()) | special
    tokenizer.save(str(directory / "tokenizer.json"))
    documents = {
        "config.json": config,
        "generation_config.json": special,
        "tokenizer_config.json": _tokenizer_config(),
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=1))
    save_file(_weights(config["vocab_size"], seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }


def _config(vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def _weights(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Normal weights scaled by fan-in, so that activations keep their size and the logits are far from flat."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": _ones(),
        # Not tied: with tied random embeddings, every token would be likeliest to follow itself.
        "lm_head.weight": matrix(vocab_size, HIDDEN) * 4,
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": _ones(),
            f"{prefix}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.post_attention_layernorm.weight": _ones(),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
    return weights


def _ones() -> np.ndarray:
    return np.ones(HIDDEN, dtype=np.float32)
