"""What no eviction policy can do better than: to know what comes."""

from collections import defaultdict, deque
from collections.abc import Sequence

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict.ranked import RankedBlocks
from perigee.replay.cache_walk import Prompt

_NEVER = 1 << 62


class Foresight:
    """Belady's MIN under the store's rules: the block that is used again last goes first.

    It knows the trace, and is bound like any other policy: every block of a prompt is brought in, none leaves while
    its prompt is being served, and children go before their parents, which are never used again after them.
    """

    def __init__(self, prompts: Sequence[Prompt], num_slots: int) -> None:
        self._coming: defaultdict[BlockKey, deque[int]] = defaultdict(deque)
        for number, prompt in enumerate(prompts):
            for key in prompt[:num_slots]:
                self._coming[key].append(number)
        self._allowed = RankedBlocks()

    def use(self, key: BlockKey, now: float, parent: BlockKey) -> None:
        self._coming[key].popleft()

    def allow(self, key: BlockKey, partial: bool) -> None:
        coming = self._coming[key]
        self._allowed.add(key, (-coming[0] if coming else -_NEVER,))

    def forbid(self, key: BlockKey) -> None:
        self._allowed.discard(key)

    def pop(self) -> BlockKey | None:
        return self._allowed.pop()

    def remove(self, key: BlockKey) -> None:
        self._allowed.discard(key)
