"""Who holds which page of the cache.

Decides by reference counts. A page is held by one sequence or more; or kept, because its tokens may be asked for again; or
free. New pages are taken from the free ones first and then from the kept ones, least recently used first. Pure bookkeeping,
without tensors.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

from lorax_core.kvcache.prefix import PageKey, PrefixIndex

SCRATCH_PAGE = 0


class PageAllocator:
    """Pages 1 to `pages - 1`; page 0 is scratch, is never handed out, and stands for a page that was given back."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 2 or page_size < 1:
            raise ValueError(f"a cache needs at least 2 pages of 1 token, not {pages} of {page_size}")
        self.pages = pages
        self.page_size = page_size
        self.prefixes = PrefixIndex()
        self._free: deque[int] = deque(range(1, pages))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders: Counter[int] = Counter()

    @property
    def free(self) -> int:
        """Pages that can be allocated now, kept ones included."""
        return len(self._free) + len(self._kept)

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
        if count > self.free:
            return None
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def match(self, keys: Iterable[PageKey]) -> list[int]:
        """Hold the pages of the longest known beginning of a chain of keys, and give them in order."""
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
        """One more holder for each of these pages, which are held or kept."""
        for page in pages:
            if page == SCRATCH_PAGE:
                continue
            if self._holders[page] < 1 and page not in self._kept:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._kept.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each of these pages. Without holders, a published page is kept and any other is free."""
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
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Prove that `tables`, the pages of every living sequence, are exactly what is held; AssertionError otherwise."""
        held = Counter(page for table in tables for page in table if page != SCRATCH_PAGE)
        assert held == +self._holders, f"held by sequences {held}, by the books {+self._holders}"
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & kept, "a free page is kept"
        assert not (free | kept) & set(held), "a held page is free"
        assert SCRATCH_PAGE not in free | kept, "the scratch page was handed out"
        assert len(free) + len(kept) + len(held) == self.capacity, "a page is lost"
        assert all(page in self.prefixes for page in kept), "a kept page cannot be found"
        assert not any(page in self.prefixes for page in free), "a free page can be found"
        self.prefixes.check()

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self.prefixes.forget(page)
        return page
