"""Writes a trained model as a checkpoint that any worker loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from perigee.training.text import END_OF_TEXT, IM_END, IM_START

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\n' + message['content'] + '{IM_END}' + '\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\n' }}}}{{% endif %}}"
)


def write_model(
    directory: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Hugging Face layout, the weights in bfloat16 but for the router's biases, which are too fine for it."""
    tensors = {
        name: weight.detach().to(torch.float32 if name.endswith("_bias") else torch.bfloat16).contiguous()
        for name, weight in weights.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {
        "bos_token": END_OF_TEXT,
        "eos_token": IM_END,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens, indent=1) + "\n")
