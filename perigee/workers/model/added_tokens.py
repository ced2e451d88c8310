"""Tokens beside a vocabulary's own, such as those that end a turn."""

from collections.abc import Iterable
from itertools import groupby

from tokenizers import AddedToken, Tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Adds `tokens`, special and others, so that they get the ids that follow the vocabulary's in this order."""
    for special, group in groupby(tokens, key=lambda token: token.special):
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(group))
