"""tokenizer.json out of a GGUF file's vocabulary: byte-level BPE, as GPT-2, SmolLM and Llama 3 have it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from perigee.workers.model.errors import CheckpointError

# llama.cpp's token types: control tokens are never text, user-defined ones are text that is never split.
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "smollm")


def tokenizer_json(source: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json for the vocabulary in `metadata`.

    Raises CheckpointError for a tokenizer that is not byte-level BPE or splits text in an unknown way.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"{source}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) is served")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(f"{source}: tokenizer.ggml.pre is {pre!r}; served are {', '.join(_PRE_TOKENIZERS)}")
    tokenizer = Tokenizer(_bpe(metadata, pre))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata)
    _add_tokens(tokenizer, metadata)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def _bpe(metadata: Mapping[str, Any], pre: str) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a word that is a token as it is, even where no sequence of merges leads to it.
    return models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA_3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _post_processor(metadata: Mapping[str, Any]) -> processors.PostProcessor:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token", False) or bos is None:
        return processors.ByteLevel(trim_offsets=False)
    token = metadata["tokenizer.ggml.tokens"][bos]
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"], special_tokens=[(token, bos)]
    )


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    tokens = list(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    control = [AddedToken(token, special=True, normalized=False) for token, kind in tokens if kind == _CONTROL]
    own = [AddedToken(token, special=False, normalized=False) for token, kind in tokens if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(own)
