"""Which pages of the KV pool are free. A page holds the KVCache of one block's tokens."""

from bisect import bisect_left, insort
from dataclasses import dataclass

from perigee.kvstore.blocks import num_blocks


def pages_needed(num_tokens: int, max_len: int, page_tokens: int) -> int:
    """Pages of a sequence that has `num_tokens` and may come to `max_len`. The last token sampled is never computed."""
    return num_blocks(max(num_tokens, max_len - 1), page_tokens)


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of one sequence, in the order of its positions."""

    pages: tuple[int, ...]
    page_tokens: int

    @property
    def is_contiguous(self) -> bool:
        """Whether the rows of all positions are consecutive, so that attention may read them as one slice."""
        return self.pages[-1] - self.pages[0] == len(self.pages) - 1 and all(
            after == before + 1 for before, after in zip(self.pages, self.pages[1:], strict=False)
        )

    def row(self, position: int) -> int:
        """The row of the pool that holds `position`."""
        page, offset = divmod(position, self.page_tokens)
        return self.pages[page] * self.page_tokens + offset

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows of the positions from `start` up to `stop`."""
        return [self.row(position) for position in range(start, stop)]


class PagePool:
    """Hands out pages, consecutive ones where it can: best fit over the free runs, scattered when none is enough."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_free = num_pages
        self._runs: list[tuple[int, int]] = [(0, num_pages)]  # (first, length), sorted, never adjacent

    def allocate(self, count: int) -> PageTable | None:
        """`count` pages, or None if that many are not free."""
        if count > self.num_free:
            return None
        self.num_free -= count
        pages: list[int] = []
        while len(pages) < count:
            pages += self._take(count - len(pages))
        return PageTable(tuple(pages), self.page_tokens)

    def free(self, table: PageTable) -> None:
        for first, length in _runs(table.pages):
            self._give_back(first, length)
        self.num_free += len(table.pages)

    def _take(self, wanted: int) -> range:
        """The start of the smallest run that holds `wanted` pages, or all of the largest run."""
        fitting = [run for run in self._runs if run[1] >= wanted]
        first, length = min(fitting, key=_length) if fitting else max(self._runs, key=_length)
        self._runs.remove((first, length))
        taken = min(wanted, length)
        if taken < length:
            insort(self._runs, (first + taken, length - taken))
        return range(first, first + taken)

    def _give_back(self, first: int, length: int) -> None:
        index = bisect_left(self._runs, (first, 0))
        if index < len(self._runs) and self._runs[index][0] == first + length:
            length += self._runs.pop(index)[1]
        if index > 0 and sum(self._runs[index - 1]) == first:
            first, before = self._runs.pop(index - 1)
            length += before
            index -= 1
        self._runs.insert(index, (first, length))


def _runs(pages: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive pages together: (first, length) of each run."""
    runs: list[tuple[int, int]] = []
    first = stop = pages[0]
    for page in pages:
        if page != stop:
            runs.append((first, stop - first))
            first = page
        stop = page + 1
    return [*runs, (first, stop - first)]


def _length(run: tuple[int, int]) -> int:
    return run[1]
