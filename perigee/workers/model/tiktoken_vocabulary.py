"""Moonlight's vocabulary: `tiktoken.model`, as the byte-level BPE that `tokenizers` runs.

The Python files that come with it are never executed, so what they say is written here: how text is split, and how
many special tokens follow the ranked ones. Both are as in Moonshot's `tokenization_moonshot.py` of Moonlight-16B-A3B
and `tokenization_kimi.py` of Kimi K2 and Kimi Linear, whose class is `TikTokenTokenizer`.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from perigee.workers.model.added_tokens import add_tokens
from perigee.workers.model.byte_level import BYTE_TO_CHARACTER
from perigee.workers.model.errors import CheckpointError

VOCABULARY_FILE = "tiktoken.model"
TOKENIZER_CLASS = "TikTokenTokenizer"

# Ids after the ranked tokens. Moonlight's own class names 258 of them, but its model has logits for 256.
NUM_SPECIAL_TOKENS = 256

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
# Runs of Chinese characters, then words split where the case rises, as `o200k` does, and numbers by three digits.
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of `directory`; `config` is its tokenizer_config.json, which names the special tokens.

    Encodes any text as tiktoken does with these ranks. Raises CheckpointError if a file is malformed or belongs to a
    tokenizer that splits text in another way.
    """
    path = directory / VOCABULARY_FILE
    if (found := config.get("tokenizer_class")) != TOKENIZER_CLASS:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: tokenizer_class: {found!r} is not served with {VOCABULARY_FILE}, "
            f"only {TOKENIZER_CLASS!r}: how others split text is not known"
        )
    vocabulary = _read_ranks(path)
    # tiktoken takes a piece of text that is a token as it is, even where no sequence of merges leads to it.
    tokenizer = Tokenizer(models.BPE(vocabulary, list(_merges(vocabulary)), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_special_tokens(tokenizer, special_tokens(config, len(vocabulary)))
    return tokenizer


def special_tokens(config: Mapping[str, Any], num_ranked: int) -> dict[int, AddedToken]:
    """The special tokens by id, in rising order: those that `config` names, and reserved ones in between.

    Raises CheckpointError if `config` names one outside of the range, or two alike.
    """
    ids = range(num_ranked, num_ranked + NUM_SPECIAL_TOKENS)
    tokens = {id_: _special(f"<|reserved_token_{id_}|>") for id_ in ids}
    for key, entry in config.get("added_tokens_decoder", {}).items():
        if not key.isdecimal() or int(key) not in ids:
            raise CheckpointError(
                f"tokenizer_config.json: added_tokens_decoder: {key!r} is not an id from {ids[0]} to {ids[-1]}"
            )
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"tokenizer_config.json: added_tokens_decoder: {key} has no content")
        tokens[int(key)] = _special(entry["content"], entry.get("special", True))
    if len({token.content for token in tokens.values()}) < len(tokens):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder: two ids have the same content")
    return tokens


def _special(content: str, special: bool = True) -> AddedToken:
    return AddedToken(content, special=special, normalized=False)


def _read_ranks(path: Path) -> dict[str, int]:
    """Token, with a character for each byte, → rank, in rising order."""
    ranks = {text: rank for rank, text in sorted(_lines(path))}
    if list(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: the ranks are not 0, 1, 2, … with a token for each")
    if missing := [byte for byte, character in enumerate(BYTE_TO_CHARACTER) if character not in ranks]:
        raise CheckpointError(f"{path}: no token for the byte {missing[0]:#04x} ({len(missing)} bytes in all)")
    return ranks


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    characters = dict(enumerate(BYTE_TO_CHARACTER))
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            encoded, rank = line.split()
            yield int(rank), base64.b64decode(encoded, validate=True).decode("latin-1").translate(characters)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: line {number}: {line[:80]!r} is not a token in base64 and a rank"
            ) from error


def _merges(vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Every split of a token into two tokens, by the token's rank.

    tiktoken merges the two neighbours that make up the token of lowest rank, leftmost first. So do these merges: as
    merging is deterministic, of all splits of a token only one ever occurs, the last that merging the token's own bytes
    comes to. The order among the splits of one token therefore does not matter.
    """
    for token in vocabulary:
        for at in range(1, len(token)):
            if (left := token[:at]) in vocabulary and (right := token[at:]) in vocabulary:
                yield left, right


def _add_special_tokens(tokenizer: Tokenizer, tokens: Mapping[int, AddedToken]) -> None:
    add_tokens(tokenizer, tokens.values())
    for id_, token in tokens.items():
        if tokenizer.token_to_id(token.content) != id_:
            raise CheckpointError(
                f"tokenizer_config.json: added_tokens_decoder: {token.content!r} ({id_}) is a ranked token too"
            )
