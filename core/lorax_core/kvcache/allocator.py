"""Who holds which page of the cache.

Decides by reference counts: a page is free, or held by one sequence or more. Pure bookkeeping, without tensors.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

SCRATCH_PAGE = 0


class PageAllocator:
    """Pages 1 to `pages - 1`; page 0 is scratch and never handed out."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 2 or page_size < 1:
            raise ValueError(f"a cache needs at least 2 pages of 1 token, not {pages} of {page_size}")
        self.pages = pages
        self.page_size = page_size
        self._free: deque[int] = deque(range(1, pages))
        self._holders: Counter[int] = Counter()

    @property
    def free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages there are, scratch left out."""
        return self.pages - 1

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, each held once; None, and nothing changed, when there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages; all must be held already."""
        for page in pages:
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each of these pages; a page that nobody holds is free again."""
        for page in pages:
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is not held")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                self._free.append(page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Prove that `tables`, the pages of every living sequence, are exactly what is held; AssertionError otherwise."""
        held = Counter(page for table in tables for page in table)
        assert held == self._holders, f"held by sequences {held}, by the books {self._holders}"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & set(held), "a held page is free"
        assert SCRATCH_PAGE not in free | set(held), "the scratch page was handed out"
        assert len(free) + len(held) == self.capacity, "a page is lost"
