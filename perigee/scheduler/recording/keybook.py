"""Block keys in a recording: each is spelled out once, then called by its number."""

from base64 import b64decode, b64encode
from collections.abc import Sequence

from perigee.kvstore.blocks import KEY_BYTES, BlockKey

# Both sides start over when they have numbered this many: some 40 MB on the writer's.
MAX_KEYS = 1 << 18

# A prompt is a list of runs: new keys, one after the other in base64, or the number of the first of some that are known
# and how many there are.
Run = str | list[int]


class KeyWriter:
    """Numbers keys in the order in which they first come."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def encode(self, keys: Sequence[BlockKey]) -> list[Run]:
        """`keys` as runs."""
        numbers = self._numbers
        if len(numbers) >= MAX_KEYS:
            numbers.clear()
        runs: list[Run] = []
        index = 0
        while index < len(keys):
            number = numbers.get(keys[index])
            end = self._new(keys, index) if number is None else self._known(keys, index, number)
            runs.append(b64encode(b"".join(keys[index:end])).decode() if number is None else [number, end - index])
            index = end
        return runs

    def _new(self, keys: Sequence[BlockKey], start: int) -> int:
        """Numbers the keys from `start` up to the first that has a number, whose index it returns."""
        numbers = self._numbers
        for index in range(start, len(keys)):
            if keys[index] in numbers:
                return index
            numbers[keys[index]] = len(numbers)
        return len(keys)

    def _known(self, keys: Sequence[BlockKey], start: int, number: int) -> int:
        """The index of the first key after `start` that is not the next one by number."""
        numbers = self._numbers
        for index in range(start + 1, len(keys)):
            if numbers.get(keys[index]) != number + index - start:
                return index
        return len(keys)


class KeyReader:
    """Reads what a KeyWriter wrote, from its first word on."""

    def __init__(self) -> None:
        self._keys: list[BlockKey] = []

    def decode(self, runs: Sequence[Run]) -> tuple[BlockKey, ...]:
        """Raises ValueError for what no KeyWriter says."""
        if len(self._keys) >= MAX_KEYS:
            self._keys.clear()
        keys: list[BlockKey] = []
        for run in runs:
            keys += self._spelled(run) if isinstance(run, str) else self._called(*run)
        return tuple(keys)

    def _spelled(self, run: str) -> list[BlockKey]:
        data = b64decode(run, validate=True)
        if len(data) % KEY_BYTES:
            raise ValueError(f"block keys: are {len(data)} bytes, allowed are multiples of {KEY_BYTES}")
        new = [BlockKey(data[start : start + KEY_BYTES]) for start in range(0, len(data), KEY_BYTES)]
        self._keys += new
        return new

    def _called(self, first: int, count: int) -> list[BlockKey]:
        if first < 0 or count < 1 or first + count > len(self._keys):
            raise ValueError(f"block keys: are {count} from number {first}, and {len(self._keys)} are known")
        return self._keys[first : first + count]
