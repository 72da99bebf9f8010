"""Who holds which page of the cache.

Decides by reference counts. A page is held by one sequence or more; or evictable: not held, but its tokens can still be
found; or free. New pages are taken from the free ones first and then from the evictable ones, least recently used first. Pure
bookkeeping, without tensors.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

from lorax_core.kvcache.prefix import PageKey, PrefixIndex

SCRATCH_PAGE = 0


class PageAllocator:
    """Pages 1 to `pages - 1`; page 0 is scratch: it is never allocated, and stands for a page that was released."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 2 or page_size < 1:
            raise ValueError(f"a cache needs at least 2 pages of 1 token, not {pages} of {page_size}")
        self.pages = pages
        self.page_size = page_size
        self.prefixes = PrefixIndex()
        self._free: deque[int] = deque(range(1, pages))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders: Counter[int] = Counter()

    @property
    def available(self) -> int:
        """Pages that can be allocated now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def capacity(self) -> int:
        """Pages there are, scratch left out."""
        return self.pages - 1

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, each held once; None, and nothing changed, when there are not so many."""
        # Checked before the first eviction, which would forget a prefix for nothing.
        if count > self.available:
            return None
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def match(self, keys: Iterable[PageKey]) -> list[int]:
        """Hold the pages of the longest known beginning of a chain of keys; gives them in order."""
        pages: list[int] = []
        for key in keys:
            page = self.prefixes.find(key)
            if page is None:
                break
            pages.append(page)
        self.share(pages)
        return pages

    def publish(self, key: PageKey, page: int) -> None:
        """A held page is full: others may find it by its key. No-op when another page holds the same already."""
        if self._holders[page] < 1:
            raise ValueError(f"page {page} is not held and cannot be published")
        self.prefixes.publish(key, page)

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which are held or evictable."""
        for page in pages:
            if page == SCRATCH_PAGE:
                continue
            if self._holders[page] < 1 and page not in self._evictable:
                raise ValueError(f"page {page} is free and cannot be shared")
            # allocate() takes evictable pages without looking at their holders.
            self._evictable.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each of these pages. Without holders, a published page is evictable, any other free."""
        # From the end: the last page of a chain is the first to be evicted, for it is of no use without those before.
        for page in reversed(pages):
            if page == SCRATCH_PAGE:
                continue
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is not held")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                if page in self.prefixes:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Prove that `tables`, the pages of every living sequence, are exactly what is held; AssertionError otherwise."""
        held = Counter(page for table in tables for page in table if page != SCRATCH_PAGE)
        assert held == +self._holders, f"held by sequences {held}, by the allocator {+self._holders}"
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & evictable, "a free page is evictable"
        assert not (free | evictable) & set(held), "a held page is free"
        assert SCRATCH_PAGE not in free | evictable, "the scratch page was allocated"
        assert len(free) + len(evictable) + len(held) == self.capacity, "a page is lost"
        assert all(page in self.prefixes for page in evictable), "an evictable page cannot be found"
        assert not any(page in self.prefixes for page in free), "a free page can be found"
        self.prefixes.check()

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        # Before the page is rewritten: match() must not find the key with other tokens behind it.
        self.prefixes.forget(page)
        return page
