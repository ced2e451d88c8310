"""The page pool: every page has one owner, and free pages are found whatever the order in which they came back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.workers.engine.pages import PagePool, PageTable


def test_rows_follow_the_pages() -> None:
    table = PageTable((3, 7), page_tokens=4)
    assert table.rows(2, 6) == [14, 15, 28, 29]
    assert not table.is_contiguous


def test_a_fresh_pool_gives_consecutive_pages() -> None:
    table = PagePool(8, 16).allocate(5)
    assert table is not None and table.is_contiguous


def test_the_smallest_run_that_fits_is_taken() -> None:
    pool = PagePool(10, 16)
    first, second, third, _rest = (pool.allocate(n) for n in (3, 1, 2, 4))
    assert first and second and third
    pool.free(first)
    pool.free(third)
    taken = pool.allocate(2)
    assert taken is not None and taken.pages == third.pages


def test_scattered_pages_are_given_when_no_run_is_long_enough() -> None:
    pool = PagePool(4, 16)
    tables = [pool.allocate(1) for _ in range(4)]
    for table in (tables[0], tables[2]):
        assert table
        pool.free(table)
    scattered = pool.allocate(2)
    assert scattered is not None and set(scattered.pages) == {0, 2} and not scattered.is_contiguous


def test_more_pages_than_are_free_are_refused_and_nothing_is_taken() -> None:
    pool = PagePool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4


@given(st.lists(st.one_of(st.integers(1, 6), st.just(None)), max_size=60), st.randoms(use_true_random=False))
def test_no_page_has_two_owners_and_none_is_lost(steps: list[int | None], random: object) -> None:
    pool = PagePool(12, 16)
    held: list[PageTable] = []
    for step in steps:
        if step is None and held:
            pool.free(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
        elif step is not None:
            free = pool.num_free
            table = pool.allocate(step)
            assert (table is None) == (step > free)
            held += [table] if table else []
        owned = [page for table in held for page in table.pages]
        assert len(owned) == len(set(owned)) == 12 - pool.num_free
    for table in held:
        pool.free(table)
    whole = pool.allocate(12)
    assert whole is not None and whole.is_contiguous, "free runs must have merged again"


@pytest.mark.parametrize("count", [1, 12])
def test_pages_come_back(count: int) -> None:
    pool = PagePool(12, 16)
    for _ in range(3):
        table = pool.allocate(count)
        assert table
        pool.free(table)
    assert pool.num_free == 12
