from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lorax_core.kvcache.allocator import SCRATCH_PAGE, PageAllocator

PAGES = 9


class Books(RuleBasedStateMachine):
    """Tables of pages come, are shared and go; the allocator must agree with a plain count at every moment."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, page_size=4)
        self.living = []

    @rule(target=tables, count=st.integers(0, PAGES + 1))
    def allocate(self, count):
        free = self.allocator.free

        pages = self.allocator.allocate(count)

        assert (pages is None) is (count > free)
        if pages is None:
            assert self.allocator.free == free
            return []
        assert len(set(pages)) == count
        assert not set(pages) & {page for table in self.living for page in table}
        self.living.append(pages)
        return pages

    @rule(target=tables, table=tables)
    def share(self, table):
        self.allocator.share(table)

        shared = list(table)
        self.living.append(shared)
        return shared

    @rule(table=consumes(tables))
    def release(self, table):
        free = self.allocator.free
        others = Counter(page for other in self.living for page in other) - Counter(table)

        self.allocator.release(table)

        if table:
            self.living.remove(table)
        assert self.allocator.free == free + sum(1 for page in table if not others[page])

    @rule(page=st.integers(1, PAGES))
    def refuse_what_is_not_held(self, page):
        if any(page in table for table in self.living):
            return
        with pytest.raises(ValueError, match=f"page {page} is"):
            self.allocator.share([page])
        with pytest.raises(ValueError, match=f"page {page} is"):
            self.allocator.release([page])

    @invariant()
    def the_books_agree(self):
        self.allocator.check(self.living)
        held = {page for table in self.living for page in table}
        assert SCRATCH_PAGE not in held
        assert self.allocator.free == self.allocator.capacity - len(held)


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPagesAreFreeOrHeld = Books.TestCase


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_page_is_needed_for_each_begun_page_of_tokens(tokens, pages):
    assert PageAllocator(4, page_size=16).pages_for(tokens) == pages


@pytest.mark.parametrize(("pages", "page_size"), [(1, 16), (0, 16), (8, 0)])
def test_a_cache_too_small_for_one_token_is_refused(pages, page_size):
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(pages, page_size)


def make_held():
    allocator = PageAllocator(6, page_size=4)
    return allocator, [allocator.allocate(2), allocator.allocate(1)]


def lost_page(allocator, tables):
    allocator._free.pop()


def page_free_and_held(allocator, tables):
    allocator._free.append(tables[0][0])


def page_free_twice(allocator, tables):
    allocator._free.append(allocator._free[0])


def scratch_page_free(allocator, tables):
    allocator._free[0] = SCRATCH_PAGE


def page_in_two_tables(allocator, tables):
    tables[1].append(tables[0][0])


def forgotten_table(allocator, tables):
    tables.pop()


def page_swapped(allocator, tables):
    tables[0][0] = allocator._free[0]


@pytest.mark.parametrize(
    "corrupt",
    [
        lost_page,
        page_free_and_held,
        page_free_twice,
        scratch_page_free,
        page_in_two_tables,
        forgotten_table,
        page_swapped,
    ],
)
def test_check_finds_planted_corruption(corrupt):
    allocator, tables = make_held()
    allocator.check(tables)
    corrupt(allocator, tables)

    with pytest.raises(AssertionError):
        allocator.check(tables)
