"""Perigee's own policy: the block that is expected to be hit least, per time that it would stay, goes first."""

from collections import deque
from dataclasses import dataclass

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict.returns import AGE_STARTS, HORIZON, NUM_AGES, ReturnTimes

_EPOCHS = 64
"""Epochs in which as many blocks are committed as the arena holds."""
_EPOCHS_PER_LESSON = 8
"""How often the ranking is computed anew."""
_MAX_USES = 4
"""Blocks used more often than this are alike."""
_NUM_CLASSES = 2 * _MAX_USES
_PARTIAL = _NUM_CLASSES * NUM_AGES
"""The cell of partial blocks, after those of every class and age."""


@dataclass(slots=True)
class _Tracked:
    """A block that is resident, or was less than HORIZON epochs ago. The policy owns and fills it."""

    key: BlockKey
    uses: int = 0  # up to _MAX_USES
    has_grown: bool = False  # had a child at some time: the tail of a prompt hardly ever returns
    epoch: int = -1  # of the last use
    bracket: int = 0  # of ages that it has reached, in its class: class * NUM_AGES + age
    resident: bool = False
    partial: bool = False
    cell: int | None = None  # while it may be evicted


class HitDensity:
    """Blocks of one class and age make a cell; victims come from the cell of the least hit density, oldest first.

    A class is how often a block was used and whether a prompt ever went on after it. How soon the blocks of a class
    return is learned online, also from blocks that were evicted and came back: their names are kept while as many
    blocks are committed as eight arenas hold, so about 300 bytes for each of at most eight times the blocks.

    A use costs O(1), and so does each of the brackets of ages that the block passes until the next one.
    """

    def __init__(self, num_blocks: int) -> None:
        self._commits_per_epoch = max(1, num_blocks // _EPOCHS)
        self._num_commits = 0
        self._epoch = 0
        self._tracked: dict[BlockKey, _Tracked] = {}
        # The blocks used in each epoch, the last one at the end; those used again since are skipped when met.
        self._used: deque[list[_Tracked]] = deque([[]], maxlen=HORIZON + 1)
        self._returns = ReturnTimes(_NUM_CLASSES)
        self._cells: list[dict[BlockKey, _Tracked]] = [{} for _ in range(_PARTIAL + 1)]
        self._cell_at: list[int] = []  # cells from the first to give up
        self._rank: list[int] = [0] * (_PARTIAL + 1)  # the reverse
        self._filled = 0  # bit r: the cell of rank r has blocks
        self._rank_cells()

    def use(self, key: BlockKey, now: float, parent: BlockKey) -> None:
        tracked, returns = self._tracked, self._returns
        block = tracked.get(key)
        if block:
            returns.returned[block.bracket] += 1
        else:
            block = tracked[key] = _Tracked(key)
        if not block.resident:
            block.resident = True
            self._count_commit()
        if block.epoch != self._epoch:
            block.epoch = self._epoch
            self._used[-1].append(block)
        if block.uses < _MAX_USES:
            block.uses += 1
        block.bracket = (2 * block.uses - 2 + block.has_grown) * NUM_AGES
        returns.reached[block.bracket] += 1
        if block.cell is not None:
            self._place_again(block)
        above = tracked.get(parent)
        if above and not above.has_grown:
            self._grow(above)

    def allow(self, key: BlockKey, partial: bool) -> None:
        block = self._tracked[key]
        block.partial = partial
        self._place(block)

    def forbid(self, key: BlockKey) -> None:
        block = self._tracked.get(key)
        if block and block.cell is not None:
            self._displace(block, block.cell)

    def pop(self) -> BlockKey | None:
        if not self._filled:
            return None
        lowest = (self._filled & -self._filled).bit_length() - 1
        block = next(iter(self._cells[self._cell_at[lowest]].values()))
        self.remove(block.key)
        return block.key

    def remove(self, key: BlockKey) -> None:
        block = self._tracked[key]
        if block.cell is not None:
            self._displace(block, block.cell)
        block.resident = False
        if block.bracket % NUM_AGES == NUM_AGES - 1:
            del self._tracked[key]

    def _grow(self, block: _Tracked) -> None:
        """The block has its first child, and so turns out to be of another class."""
        reached = self._returns.reached
        reached[block.bracket] -= 1
        block.has_grown = True
        block.bracket += NUM_AGES
        reached[block.bracket] += 1
        if block.cell is not None:
            self._place_again(block)

    # ---- time ----------------------------------------------------------------------------------------------------

    def _count_commit(self) -> None:
        self._num_commits += 1
        if self._num_commits % self._commits_per_epoch == 0:
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._used.append([])
        for start in AGE_STARTS[1:]:
            if start > self._epoch:
                break
            self._used[-1 - start] = self._aged(self._used[-1 - start], self._epoch - start)
        if self._epoch >= HORIZON:
            self._forget(self._used[-1 - HORIZON])
        if self._epoch % _EPOCHS_PER_LESSON == 0:
            self._rank_cells()
            self._returns.fade()

    def _aged(self, used: list[_Tracked], epoch: int) -> list[_Tracked]:
        """Those of the blocks used in an epoch that were not used since: they have reached the next bracket of ages."""
        aged = [block for block in used if block.epoch == epoch]
        reached = self._returns.reached
        for block in aged:
            block.bracket += 1
            reached[block.bracket] += 1
            if block.cell is not None:
                self._place_again(block)
        return aged

    def _forget(self, blocks: list[_Tracked]) -> None:
        """These have reached the last bracket. Those that were evicted are known no more."""
        for block in blocks:
            if not block.resident:
                del self._tracked[block.key]

    # ---- cells ---------------------------------------------------------------------------------------------------

    def _rank_cells(self) -> None:
        """Orders the cells by what has been learned; equals by age, the oldest first."""
        cells = [
            (density, -age, klass * NUM_AGES + age)
            for klass, densities in enumerate(self._returns.densities())
            for age, density in enumerate(densities)
        ]
        self._cell_at = [_PARTIAL, *(cell for _, _, cell in sorted(cells))]
        for rank, cell in enumerate(self._cell_at):
            self._rank[cell] = rank
        self._filled = sum(1 << rank for rank, cell in enumerate(self._cell_at) if self._cells[cell])

    def _place(self, block: _Tracked) -> None:
        block.cell = _PARTIAL if block.partial else block.bracket
        self._cells[block.cell][block.key] = block
        self._filled |= 1 << self._rank[block.cell]

    def _displace(self, block: _Tracked, number: int) -> None:
        """It is in the cell of that number."""
        cell = self._cells[number]
        del cell[block.key]
        if not cell:
            self._filled &= ~(1 << self._rank[number])
        block.cell = None

    def _place_again(self, block: _Tracked) -> None:
        """It may be evicted, and its class or age has changed."""
        assert block.cell is not None
        self._displace(block, block.cell)
        self._place(block)
