"""A tiktoken vocabulary in Moonlight's published layout and of its size, generated in a second and always the same."""

import base64
import json
from collections.abc import Iterable, Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_letters, ascii_lowercase, digits, punctuation
from typing import Any

NUM_BASE_TOKENS, NUM_SPECIAL_TOKENS = 163_584, 256
VOCAB_SIZE = NUM_BASE_TOKENS + NUM_SPECIAL_TOKENS

# The special tokens that tokenizer_config.json names, by their offset from the first.
SPECIAL_TOKENS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
BOS, EOS, IM_END = (NUM_BASE_TOKENS + offset for offset in range(3))

DEFAULT_SYSTEM = "You are a helpful assistant"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>" + DEFAULT_SYSTEM + "<|im_end|>"
    "{%- endif -%}"
    "{%- if message['role'] == 'system' -%}<|im_system|>{%- endif -%}"
    "{%- if message['role'] == 'user' -%}<|im_user|>{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}"
    "{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)

# Whoever executes the directory's Python files finds this file beside them.
TRAP_FILE = "executed"


def write_tiktoken(directory: Path, num_base_tokens: int = NUM_BASE_TOKENS) -> Path:
    """Writes tiktoken.model, tokenizer_config.json, and a Python file that must not run; returns `directory`.

    `num_base_tokens`, at least 256, is the model's vocabulary without the 256 special tokens.
    """
    tokens = islice(_distinct(_tokens()), num_base_tokens)
    lines = [b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_bytes(b"".join(lines))
    config = json.dumps(tokenizer_config(num_base_tokens), indent=2)
    (directory / "tokenizer_config.json").write_text(config)
    trap = f"open({str(directory / TRAP_FILE)!r}, 'w')\nraise RuntimeError('a file of the checkpoint was executed')\n"
    (directory / "tokenization_moonshot.py").write_text(trap)
    return directory


def tokenizer_config(num_base_tokens: int = NUM_BASE_TOKENS) -> dict[str, Any]:
    """The content of Moonlight's tokenizer_config.json, for a vocabulary of this size."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {
            str(num_base_tokens + offset): {"content": content, **flags} for offset, content in SPECIAL_TOKENS.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS.values())[2:-2],
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "model_max_length": 1_048_576,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }


def _distinct(tokens: Iterable[bytes]) -> Iterator[bytes]:
    seen: set[bytes] = set()
    for token in tokens:
        if token not in seen:
            seen.add(token)
            yield token


def _tokens() -> Iterator[bytes]:
    """Bytes, then ever longer tokens, each made of two earlier ones."""
    yield from (bytes([byte]) for byte in [*range(0x21, 0x7F), *range(0x21), *range(0x7F, 0x100)])
    yield from (b" " * length for length in range(2, 65))
    yield from (b"\n" * length for length in range(2, 9))
    yield from _pairs([" "], ascii_letters + punctuation)
    yield from _pairs(ascii_letters, ascii_lowercase)
    yield from _pairs(punctuation, punctuation + "\n")
    yield from _numbers()
    yield from _characters(range(0xC3, 0xD2), 2)  # Latin, Greek, Cyrillic
    yield from _characters(range(0xE4, 0xEA), 3)  # Chinese
    yield from (b"\xf0\x9f", b"\xf0\x9f\x98", *(b"\xf0\x9f\x98" + bytes([last]) for last in range(0x80, 0xC0)))  # emoji
    yield from _pairs([" " + letter for letter in ascii_letters], ascii_lowercase)
    yield from _pairs(map("".join, product(ascii_letters, ascii_lowercase)), ascii_lowercase)
    yield from _pairs(
        map("".join, product(ascii_lowercase, repeat=2)), map("".join, product(ascii_lowercase, repeat=2))
    )


def _pairs(left: Iterable[str], right: Iterable[str]) -> Iterator[bytes]:
    return (f"{first}{second}".encode() for first, second in product(left, right))


def _numbers() -> Iterator[bytes]:
    return ("".join(number).encode() for length in (2, 3) for number in product(digits, repeat=length))


def _characters(first_bytes: range, length: int) -> Iterator[bytes]:
    """UTF-8 characters of `length` bytes that begin so, each after the bytes that it begins with."""
    for first in first_bytes:
        for middle in product(range(0x80, 0xC0), repeat=length - 2):
            start = bytes([first, *middle])
            yield start
            yield from (start + bytes([last]) for last in range(0x80, 0xC0))
