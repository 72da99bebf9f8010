from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lorax_core.kvcache.allocator import SCRATCH_PAGE, PageAllocator

PAGES = 9
KEYS = [b"one", b"two", b"three"]


class Books(RuleBasedStateMachine):
    """Tables of pages come, are shared, published, found again and go; a plain account must agree at every moment."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(PAGES, page_size=4)
        self.living = []
        self.keys = {}  # page to its key
        self.kept = []  # published pages that nobody holds, least recently used first

    def holders(self, page):
        return sum(table.count(page) for table in self.living)

    def hold(self, pages):
        self.living.append(pages)
        self.kept = [page for page in self.kept if page not in pages]
        return pages

    @rule(target=tables, count=st.integers(0, PAGES + 1))
    def allocate(self, count):
        free = self.allocator.available
        unused = free - len(self.kept)

        pages = self.allocator.allocate(count)

        assert (pages is None) is (count > free)
        if pages is None:
            assert self.allocator.available == free
            return []
        assert len(set(pages)) == count
        assert not any(self.holders(page) for page in pages)
        # What may be asked for again is given up last, and of it what was used longest ago first.
        assert pages[unused:] == self.kept[: max(count - unused, 0)]
        for page in pages:
            self.keys.pop(page, None)
        return self.hold(list(pages))

    @rule(target=tables, table=tables)
    def share(self, table):
        self.allocator.share(table)

        return self.hold(list(table))

    @rule(table=consumes(tables))
    def release(self, table):
        self.allocator.release(table)

        if table:
            self.living.remove(table)
        self.kept += [page for page in reversed(table) if page in self.keys and not self.holders(page)]

    @rule(table=tables, at=st.integers(0, PAGES), key=st.sampled_from(KEYS))
    def publish(self, table, at, key):
        if not table:
            return
        page = table[at % len(table)]

        self.allocator.publish(key, page)

        if key not in self.keys.values() and page not in self.keys:
            self.keys[page] = key

    @rule(target=tables, keys=st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
    def match(self, keys):
        pages_of = {key: page for page, key in self.keys.items()}
        expected = list(takewhile(lambda page: page is not None, map(pages_of.get, keys)))

        pages = self.allocator.match(keys)

        assert pages == expected
        return self.hold(list(pages))

    @rule(page=st.integers(1, PAGES))
    def refuse_what_is_not_held(self, page):
        if self.holders(page):
            return
        with pytest.raises(ValueError, match=f"page {page} is"):
            self.allocator.release([page])
        with pytest.raises(ValueError, match=f"page {page} is"):
            self.allocator.publish(b"key", page)
        if page not in self.kept:
            with pytest.raises(ValueError, match=f"page {page} is"):
                self.allocator.share([page])

    @invariant()
    def the_books_agree(self):
        self.allocator.check(self.living)
        held = {page for table in self.living for page in table}
        assert SCRATCH_PAGE not in held
        assert self.allocator.available == self.allocator.capacity - len(held)
        assert all(self.allocator.holders(page) == self.holders(page) for page in range(1, PAGES))
        assert len(self.allocator.prefixes) == len(self.keys)


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


def kept_page_unknown(allocator, tables):
    page = tables[0].pop()
    allocator.publish(b"key", page)
    allocator.release([page])
    allocator.prefixes.forget(page)


def keys_disagree(allocator, tables):
    allocator.publish(b"key", tables[0][0])
    allocator.prefixes._pages[b"key"] = tables[0][1]


def free_page_known(allocator, tables):
    allocator.publish(b"key", tables[0][0])
    allocator.prefixes._keys[allocator._free[0]] = allocator.prefixes._keys.pop(tables[0][0])


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
        kept_page_unknown,
        keys_disagree,
        free_page_known,
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


def test_the_scratch_page_stands_for_a_page_given_back_and_is_nobodys():
    allocator, tables = make_held()
    allocator.release([tables[0][0]])
    tables[0][0] = SCRATCH_PAGE

    allocator.share(tables[0])
    allocator.check([*tables, tables[0]])
    allocator.release(tables[0])
    allocator.release(tables[0])

    allocator.check(tables[1:])


def test_of_a_chain_the_end_is_given_up_before_the_beginning():
    allocator = PageAllocator(4, page_size=4)
    pages = allocator.allocate(3)
    for key, page in zip(KEYS, pages, strict=False):
        allocator.publish(key, page)
    allocator.release(pages)

    taken = allocator.allocate(1)
    found = allocator.match(KEYS)

    assert taken == pages[2:]
    assert found == pages[:2]
    allocator.check([taken, found])
