"""Which store node holds which blocks, in which tier.

Every node has a number, the lowest that is free. A block has the ascending codes of its copies, `2 * number + tier`,
packed into bytes of four each. So a block takes the memory that its copies need, however many nodes there are; and
since blocks of one prompt came to the same nodes in the same order, most share the very same bytes.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.ids import NodeId

_TIERS = len(Tier)
_CODE: Final = "I"
_CODE_BYTES = 4
_NOBODY = b""

# What is remembered of how copies come and go, and of what they mean. Both only save time and memory.
_MAX_MOVES = 1 << 16
_MAX_MASKS = 1 << 12

# From how many on a numpy operation is faster than a loop.
_MANY = 16


class Match(Mapping[NodeId, int]):
    """How many leading blocks of a prompt each known node holds. Of use until the index changes.

    Nodes that hold equally many are a group, a mask of the nodes' numbers; those that hold nothing are none. Of those
    that have some on SSD alone `ssd_blocks` says how many, by the node's number.
    """

    def __init__(self, numbers: Mapping[NodeId, int], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.groups: dict[int, int] = {}  # by number of blocks, the fewest first
        self.ssd_blocks: dict[int, int] = {}
        self._numbers = numbers

    def end(self, nodes: int, index: int) -> None:
        """The nodes of this mask hold the blocks before this one, and not this one."""
        if nodes and index:
            self.groups[index] = nodes

    def move(self, before: int, after: int, index: int) -> None:
        """From block `index` on the nodes of the mask `after` have them on SSD only, up to it those of `before` had. A
        count is right once the node has left again: the sum of the ends less that of the beginnings.
        """
        counts = self.ssd_blocks
        for node in positions(after & ~before):
            counts[node] = counts.get(node, 0) - index
        for node in positions(before & ~after):
            counts[node] += index

    def blocks(self, number: int) -> int:
        """Of the node of this number."""
        return next((blocks for blocks, nodes in self.groups.items() if nodes >> number & 1), 0)

    def __getitem__(self, node: NodeId) -> int:
        return self.blocks(self._numbers[node])

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class PrefixIndex:
    """Fed with what the store nodes tell. The truth is theirs: this may be a moment behind it."""

    def __init__(self) -> None:
        self.numbers: dict[NodeId, int] = {}
        self._nodes: list[NodeId | None] = []  # by number
        self._held: dict[BlockKey, bytes] = {}
        self._moves: dict[tuple[bytes, int, bool], bytes] = {}
        self._masks: dict[bytes, tuple[int, int]] = {}
        self._num_in_dram: Counter[NodeId] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: BlockKey) -> bool:
        """Whether any node holds it, in whatever tier."""
        return key in self._held

    def apply(self, node: NodeId, events: Iterable[BlockEvent]) -> None:
        """Enters what came to a node and what left it, in order."""
        first_code = _TIERS * self._number_of(node)
        held, moves = self._held, self._moves
        more = 0  # in DRAM
        for event in events:
            key = event.key
            before = held.get(key, _NOBODY)
            move = (before, first_code + event.tier, event.stored)
            after = moves.get(move)
            if after is None:
                after = self._moved(move)
            if event.tier == Tier.DRAM and after != before:
                more += 1 if event.stored else -1
            if after:
                held[key] = after
            elif before:
                del held[key]
        self._num_in_dram[node] += more

    def forget(self, node: NodeId) -> None:
        """Drops all that is known of a node. Its number may then be another's. Takes time linear in all blocks."""
        number = self.numbers.pop(node, None)
        if number is None:
            return
        self._nodes[number] = None
        del self._num_in_dram[node]
        kept: dict[bytes, bytes] = {}
        for codes in set(self._held.values()):
            left = codes
            for tier in Tier:
                left = _without(left, _TIERS * number + tier)
            kept[codes] = left
        self._held = {key: left for key, codes in self._held.items() if (left := kept[codes])}

    @property
    def num_numbers(self) -> int:
        """All numbers are below this."""
        return len(self._nodes)

    def node(self, number: int) -> NodeId:
        """The node that has this number."""
        node = self._nodes[number]
        assert node is not None, "nobody has this number"
        return node

    def holders(self, key: BlockKey) -> list[NodeId]:
        """The nodes that hold a block, in whatever tier."""
        numbers = {code // _TIERS for code in _codes(self._held.get(key, _NOBODY))}
        return [node for node, number in self.numbers.items() if number in numbers]

    def num_in_dram(self, node: NodeId) -> int:
        """How many blocks a node has in memory."""
        return self._num_in_dram[node]

    def shared(self, keys: Iterable[BlockKey], node: NodeId, others: Iterable[NodeId]) -> list[BlockKey]:
        """Those that the node holds and one of the others, too."""
        own, rest = self._mask_of([node]), self._mask_of(others)
        held = ((key, self._masks_of(self._held.get(key, _NOBODY))[0]) for key in keys)
        return [key for key, holders in held if holders & own and holders & rest]

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """How far each known node holds these keys from the first on. One step a key, until no node holds the next one;
        whoever stays is not looked at again.
        """
        match = Match(self.numbers, len(keys))
        last, alive, on_ssd = _NOBODY, 0, 0
        for index, codes in enumerate(map(self._held.get, keys)):
            if codes == last:
                continue
            if codes is None:
                codes = _NOBODY
            holders, in_dram = self._masks_of(codes)
            still = holders & alive if index else holders
            match.end(alive & ~still, index)
            if on_ssd or holders != in_dram:
                match.move(on_ssd, still & ~in_dram, index)
                on_ssd = still & ~in_dram
            last, alive = codes, still
            if not alive:
                return match
        match.end(alive, len(keys))
        match.move(on_ssd, 0, len(keys))
        return match

    def _mask_of(self, nodes: Iterable[NodeId]) -> int:
        return _mask([self.numbers[node] for node in nodes if node in self.numbers])

    def _number_of(self, node: NodeId) -> int:
        number = self.numbers.get(node)
        if number is None:
            if None not in self._nodes:
                self._nodes.append(None)
            number = self.numbers[node] = self._nodes.index(None)
            self._nodes[number] = node
        return number

    def _moved(self, move: tuple[bytes, int, bool]) -> bytes:
        codes, code, stored = move
        after = _with(codes, code) if stored else _without(codes, code)
        if len(self._moves) >= _MAX_MOVES:
            self._moves.clear()
        self._moves[move] = after
        return after

    def _masks_of(self, codes: bytes) -> tuple[int, int]:
        """Bit masks by node number: who holds a block, and who of them in memory."""
        masks = self._masks.get(codes)
        if masks is None:
            if len(self._masks) >= _MAX_MASKS:
                self._masks.clear()
            numbers = [divmod(code, _TIERS) for code in _codes(codes)]
            in_dram = _mask([number for number, tier in numbers if tier == Tier.DRAM])
            masks = self._masks[codes] = _mask([number for number, _ in numbers]), in_dram
        return masks


def _codes(packed: bytes) -> "memoryview[int]":
    return memoryview(packed).cast(_CODE)


def _with(packed: bytes, code: int) -> bytes:
    at, is_there = _find(packed, code)
    return packed if is_there else packed[:at] + array(_CODE, [code]).tobytes() + packed[at:]


def _without(packed: bytes, code: int) -> bytes:
    at, is_there = _find(packed, code)
    return packed[:at] + packed[at + _CODE_BYTES :] if is_there else packed


def _find(packed: bytes, code: int) -> tuple[int, bool]:
    """The byte at which a code stands or would stand, and whether it does."""
    codes = _codes(packed)
    index = bisect_left(codes, code)
    return _CODE_BYTES * index, index < len(codes) and codes[index] == code


def _mask(numbers: Sequence[int]) -> int:
    if len(numbers) <= _MANY:
        return sum(1 << number for number in set(numbers))
    flags = np.zeros(max(numbers) + 1, np.bool_)
    flags[numbers] = True
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def flags(mask: int, size: int) -> NDArray[np.bool_]:
    """The lowest `size` bits of a mask."""
    packed = np.frombuffer(mask.to_bytes(size // 8 + 1, "little"), np.uint8)
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)


def positions(mask: int) -> Iterator[int]:
    """Of the bits of a mask, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
