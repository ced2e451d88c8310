"""Block keys for the prompts of a trace, without tokens: equal ids of the trace are equal prefixes."""

import hashlib

from perigee.kvstore.blocks import BlockKey, num_blocks
from perigee.replay.errors import TraceError
from perigee.replay.trace import TraceRequest

ROOT = BlockKey(bytes(32))
"""The parent of each prompt's first block."""


class PromptKeys:
    """The keys of prompts in blocks of `block_tokens`, which divide the blocks of the trace."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        # Equal keys are one object: half the memory, and dictionaries find it sooner.
        self._known: dict[tuple[int, int, int], BlockKey] = {}

    def of(self, request: TraceRequest) -> tuple[BlockKey, ...]:
        """One for each block, the last, partial one included, whose key covers its tokens alone. Raises TraceError."""
        size = self._block_tokens
        per_id, rest = divmod(request.block_tokens, size)
        if rest:
            raise TraceError(f"block_tokens: {size} given, allowed are divisors of {request.block_tokens}")
        ids, length = request.prefix_ids, request.input_tokens
        if len(set(ids)) < len(ids):
            raise TraceError(f"prefix_ids: {ids[:20]}: one is there twice, though each names all before it, too")
        return tuple(
            self._key(ids[index // per_id], index % per_id, min(size, length - index * size))
            for index in range(num_blocks(length, size))
        )

    def _key(self, prefix_id: int, part: int, num_tokens: int) -> BlockKey:
        name = prefix_id, part, num_tokens
        if name not in self._known:
            self._known[name] = _digest(f"{prefix_id}/{part}/{num_tokens}")
        return self._known[name]


def output_keys(
    prompt_keys: tuple[BlockKey, ...], request_id: str, prompt_len: int, num_tokens: int, block_tokens: int
) -> tuple[BlockKey, ...]:
    """The keys of the first `num_tokens` of a prompt and its answer. Traces do not say which later prompts go on from
    an answer, so blocks that hold a part of one are nobody else's.
    """
    full, total = prompt_len // block_tokens, num_blocks(num_tokens, block_tokens)
    if num_tokens == prompt_len:
        return prompt_keys
    own = (
        _digest(f"{request_id}/{index}/{min(block_tokens, num_tokens - index * block_tokens)}")
        for index in range(full, total)
    )
    return prompt_keys[:full] + tuple(own)


def _digest(name: str) -> BlockKey:
    return BlockKey(hashlib.sha256(name.encode()).digest())
