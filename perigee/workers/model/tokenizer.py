"""Text to tokens and back, from a directory in Hugging Face layout. Imports no torch, so that servers can use it."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from perigee.workers.model.added_tokens import add_tokens
from perigee.workers.model.byte_level import token_bytes
from perigee.workers.model.errors import ModelError
from perigee.workers.model.tiktoken_vocabulary import VOCABULARY_FILE, read_vocabulary

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_FALLBACK_BYTE = re.compile("<0x([0-9A-F]{2})>")

# Marks, in a rendered chat, a special token's text that a message merely quotes: a private-use character, which the
# content is cleared of first, on either side of the special token's index.
_QUOTE = "\U0010fffd"


class TokenizerError(ModelError):
    """Raised when a tokenizer cannot be loaded, or a conversation does not suit the model's chat template."""


class Tokenizer:
    """A model's vocabulary, its special tokens and its chat template. Safe to use from several threads."""

    def __init__(self, tokens: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None) -> None:
        self._tokens = tokens
        self._plain = _without_special_tokens(tokens)
        self._special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token")}
        self._special_texts = _special_texts(self._tokens)
        self._template = _compile(chat_template) if chat_template else None
        self._byte_level = tokens.decoder is not None and tokens.decoder.decode(["Ġ"]) == " "

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Reads tokenizer.json or else tiktoken.model, and tokenizer_config.json and chat_template.jinja, if there.

        Raises TokenizerError or CheckpointError if there is no vocabulary or one of the files is malformed.
        """
        config = _read_config(directory / CONFIG_FILE)
        return cls(_read_tokens(directory, config), config, _read_template(directory, config))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self._tokens.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of `text`. Special tokens that it spells out are taken as such."""
        return _encode(self._tokens, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._tokens.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character only. Empty for an unknown id."""
        token = self._tokens.id_to_token(token_id)
        if token is None:
            return b""
        if token in self._special_texts:
            return token.encode()
        if self._byte_level:
            return token_bytes(token)
        fallback = _FALLBACK_BYTE.fullmatch(token)
        return bytes.fromhex(fallback[1]) if fallback else token.replace("▁", " ").encode()

    def is_fallback_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that has no token, in the way of SentencePiece."""
        token = self._tokens.id_to_token(token_id)
        return not self._byte_level and token is not None and _FALLBACK_BYTE.fullmatch(token) is not None

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation as the model saw it in training, up to where the assistant's answer begins.

        Raises TokenizerError if the model has no chat template or the template refuses the messages.
        """
        if self._template is None:
            raise TokenizerError(f"this model has no chat template ({CONFIG_FILE} or {TEMPLATE_FILE})")
        special = {name: text for name, text in self._special.items() if text is not None}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **special)
        except (TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(f"the model's chat template refused the messages: {error}") from error

    def apply_chat_template(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of `render_chat(messages)`, but what a message's content spells out is never a special token.

        So no user can end a turn, or begin one in somebody else's name.
        """
        rendered = self.render_chat([self._quote(message) for message in messages])
        token_ids: list[int] = []
        for index, part in enumerate(rendered.split(_QUOTE)):
            if index % 2:
                token_ids += _encode(self._plain, self._special_texts[int(part)], False)
            elif part:
                token_ids += _encode(self._tokens, part, False)
        return token_ids

    def _quote(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, str):
            return message
        quoted = content.replace(_QUOTE, "\ufffd")
        for index, text in enumerate(self._special_texts):
            if text in quoted:
                quoted = quoted.replace(text, f"{_QUOTE}{index}{_QUOTE}")
        return {**message, "content": quoted}


def _read_tokens(directory: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    vocabulary = directory / TOKENIZER_FILE
    if vocabulary.is_file():
        return _parse(vocabulary.read_text(encoding="utf-8"))
    if (directory / VOCABULARY_FILE).is_file():
        return read_vocabulary(directory, config)
    raise TokenizerError(f"{vocabulary} does not exist: a model directory needs it, or {VOCABULARY_FILE}")


def _parse(vocabulary: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(vocabulary)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{TOKENIZER_FILE} is malformed: {error}") from error


def _without_special_tokens(tokens: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Reads special tokens as the plain text that they are in what a user quotes. Shares the vocabulary in memory."""
    plain = tokenizers.Tokenizer(tokens.model)
    plain.normalizer = tokens.normalizer
    plain.pre_tokenizer = tokens.pre_tokenizer
    plain.post_processor = tokens.post_processor
    plain.decoder = tokens.decoder
    add_tokens(plain, (token for _, token in sorted(tokens.get_added_tokens_decoder().items())))
    plain.encode_special_tokens = True
    return plain


def _encode(tokens: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # The batch call, unlike `encode`, lets other threads run meanwhile and computes no offsets.
    ids: list[int] = tokens.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _special_texts(tokens: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The special tokens' texts, longest first so that none hides a longer one."""
    added = tokens.get_added_tokens_decoder().values()
    return tuple(sorted((token.content for token in added if token.special), key=len, reverse=True))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is malformed: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(config).__name__}")
    return config


def _read_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, or a string or list of named templates in the configuration."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"chat_template in {directory / CONFIG_FILE} must be a string or a list of named templates"
        )
    return template


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """A special token is written as its text or as an object that has it as `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _compile(chat_template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(chat_template)
    except TemplateError as error:
        raise TokenizerError(f"the chat template is malformed: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
