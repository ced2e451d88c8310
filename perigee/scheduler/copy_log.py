"""Which blocks came to be on more than one node, and when anybody last asked for them.

Fetching for prefill and handing over to decode leave copies behind. This is the record of them, in order of last use; a
request uses a run of blocks if its prompt goes on after the run's last one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.ids import NodeId

# More blocks than this are not remembered: the runs go that were used longest ago.
_MOST_BLOCKS = 1 << 18


@dataclass(slots=True)
class Run:
    """Blocks that follow each other, and the nodes that got copies of them."""

    keys: tuple[BlockKey, ...]
    nodes: dict[NodeId, None]
    used_at: float


class CopyLog:
    """Told of each dispatch, and of what is trimmed."""

    def __init__(self) -> None:
        self._runs: dict[BlockKey, Run] = {}  # by the last key, the least recently used first
        self._num_blocks = 0

    def __len__(self) -> int:
        return len(self._runs)

    def use(self, keys: tuple[BlockKey, ...], now: float) -> None:
        """A prompt of these blocks was asked for."""
        for key in list(filter(self._runs.__contains__, keys)):
            run = self._runs.pop(key)
            run.used_at = now
            self._runs[key] = run

    def add(self, node: NodeId, keys: tuple[BlockKey, ...], now: float) -> None:
        """A node gets copies of these blocks."""
        if not keys:
            return
        run = self._runs.get(keys[-1])
        if run is None:
            self._runs[keys[-1]] = Run(keys, {node: None}, now)
            self._num_blocks += len(keys)
            self._forget_oldest()
        else:
            run.nodes[node] = None

    def remove(self, node: NodeId, run: Run) -> None:
        """Its copies are no longer there, or not to be thought of."""
        run.nodes.pop(node, None)
        if not run.nodes:
            self._drop(run.keys[-1])

    def unused(self, since: float) -> Iterator[Run]:
        """Those that nobody has used since then, the one used longest ago first."""
        for run in list(self._runs.values()):
            if run.used_at > since:
                return
            yield run

    def _forget_oldest(self) -> None:
        while self._num_blocks > _MOST_BLOCKS:
            self._drop(next(iter(self._runs)))

    def _drop(self, last: BlockKey) -> None:
        run = self._runs.pop(last, None)
        self._num_blocks -= len(run.keys) if run is not None else 0
