"""Prompts for a trace: two requests share exactly the tokens that their block ids share.

Block contents are drawn from a hash of (seed, block id), so any replayer of a trace makes the same prompts, one by one
and in any order. Drawn tokens could agree by chance, so what starts a block is not drawn but counted: blocks that
follow the same prefix are siblings, and siblings differ in their first token, so that sharing ends where the ids say.
"""

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from perigee.replay.errors import TraceError
from perigee.replay.trace import TraceRequest

CONSERVATIVE_VOCAB_SIZE = 32_000
"""The smallest vocabulary in common use (Llama 2's), for endpoints that don't tell theirs."""

_ROOT = -1  # the parent of first blocks; ids are 0 or more


def ordinary_tokens(vocab_size: int) -> range:
    """Token ids to make prompts of, without special tokens: those sit at the very start of a vocabulary (Llama 2,
    SmolLM2) or at its very end (Llama 3, Moonlight), so an eighth is left out on either side.
    """
    margin = vocab_size // 8
    return range(margin, vocab_size - margin)


@dataclass(frozen=True, slots=True)
class _Siblings:
    """Which child of its parent each block is, and how many children the most prolific parent has."""

    ordinals: dict[tuple[int, int], int]
    most: int


class Prompts:
    """The prompts of the requests of one trace, of the token ids in `tokens`.

    Raises TraceError if `tokens` are too few to tell all siblings of the trace apart within a block.
    """

    def __init__(self, trace: Iterable[TraceRequest], tokens: range, seed: int) -> None:
        trace = tuple(trace)
        self._tokens = tokens
        self._seed = seed
        siblings = _count_siblings(trace)
        self._ordinals = siblings.ordinals
        # One token does, unless there are more siblings than tokens: then the ordinal takes several, as its digits.
        self._num_marks = _num_digits(siblings.most, base=len(tokens))
        block_tokens = min((request.block_tokens for request in trace), default=1)
        if self._num_marks > block_tokens:
            raise TraceError(
                f"vocab_size: {len(tokens)} ordinary tokens cannot tell apart {siblings.most} blocks of {block_tokens}"
                " tokens that follow one prefix; use a larger vocabulary or length_scale"
            )

    def token_ids(self, request: TraceRequest) -> list[int]:
        """The prompt of `request`, `request.input_tokens` long."""
        ids: list[int] = []
        parent = _ROOT
        for block_id in request.prefix_ids:
            ids += self._marks(parent, block_id)
            ids += self._draw("block", block_id, request.block_tokens - self._num_marks)
            parent = block_id
        del ids[request.input_tokens :]  # the last block may be partial
        return ids

    def _marks(self, parent: int, block_id: int) -> list[int]:
        """What sets a block apart from its siblings: its ordinal, counted from a start drawn for the parent."""
        ordinal = self._ordinals[parent, block_id]
        marks = []
        for start in self._draw("children", parent, self._num_marks):
            ordinal, digit = divmod(ordinal, len(self._tokens))
            marks.append(self._tokens[(start - self._tokens.start + digit) % len(self._tokens)])
        return marks

    def _draw(self, purpose: str, block_id: int, count: int) -> list[int]:
        """`count` tokens that depend on the seed and the arguments alone; fewer are a prefix of more."""
        label = f"{self._seed}/{purpose}/{block_id}".encode()
        words = struct.unpack(f"<{count}I", hashlib.shake_128(label).digest(4 * count))
        low, size = self._tokens.start, len(self._tokens)
        return [low + word % size for word in words]


def _count_siblings(trace: Iterable[TraceRequest]) -> _Siblings:
    ordinals: dict[tuple[int, int], int] = {}
    num_children: dict[int, int] = {}
    for request in trace:
        for edge in zip((_ROOT, *request.prefix_ids), request.prefix_ids, strict=False):
            if edge not in ordinals:
                ordinals[edge] = num_children.get(edge[0], 0)
                num_children[edge[0]] = ordinals[edge] + 1
    return _Siblings(ordinals, max(num_children.values(), default=0))


def _num_digits(count: int, base: int) -> int:
    """How many digits of `base` number `count` things apart; at least one."""
    digits = 1
    while base**digits < count:
        digits += 1
    return digits
