"""Which page of the cache holds which tokens.

Decides by chained hashes: a page's key is the hash of the page before it and of its own tokens, so equal keys mean equal
whole prefixes. The first link is salted with the adapter's identity, so pages of different adapters are never shared. Pure
bookkeeping, without tensors; who holds a page is `allocator`'s.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

PageKey = bytes


def chain(before: PageKey | None, salt: str, tokens: Sequence[int]) -> PageKey:
    """The key of a full page that holds `tokens` and follows the page `before` (None at the start of a sequence)."""
    # 128 bits: a collision would let one sequence read the KV of another prefix.
    digest = hashlib.blake2b(salt.encode() if before is None else before, digest_size=16)
    # 8 bytes a token: a fixed width keeps different lists of tokens from having the same bytes.
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


class PrefixIndex:
    """Keys to pages and back. A page has one key or none."""

    def __init__(self) -> None:
        self._pages: dict[PageKey, int] = {}
        self._keys: dict[int, PageKey] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: object) -> bool:
        return page in self._keys

    def find(self, key: PageKey) -> int | None:
        """The page that holds what `key` stands for."""
        return self._pages.get(key)

    def publish(self, key: PageKey, page: int) -> bool:
        """Record that `page` holds what `key` stands for; False when another page does already."""
        # The first page wins; a duplicate stays unpublished and is free once released.
        if key in self._pages or page in self._keys:
            return self._pages.get(key) == page
        self._pages[key] = page
        self._keys[page] = key
        return True

    def forget(self, page: int) -> None:
        """The page will hold something else."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]

    def check(self) -> None:
        """Prove that both directions agree; AssertionError otherwise."""
        assert {page: key for key, page in self._pages.items()} == self._keys, "keys and pages disagree"
