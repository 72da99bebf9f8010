"""Memory for weights that every step reads from end to end, in large pages where the system has them.

Decides that weights lie end to end in few large pieces, each in pages of 2 MB: read through pages of 4 KB they take a tenth
longer. Knows nothing of what is stored.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

_PAGE = 2 * 2**20
_PIECE = 32 * 2**20  # more than malloc gives from memory that was used before, whose pages are small
_ALIGNED = 64  # bytes: a line of the cache
_MADV_HUGEPAGE = 14

_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8, device="cpu")


def large_pages(nbytes: int) -> Tensor:
    """So many bytes, uninitialised. They may share a piece with others, which is kept as long as one of them is."""
    global _rest
    whole = -(-nbytes // _ALIGNED) * _ALIGNED
    if whole >= _PIECE:
        return _piece(whole)[:nbytes]
    with _lock:
        if whole > len(_rest):
            _rest = _piece(_PIECE)
        found, _rest = _rest[:nbytes], _rest[whole:]
    return found


def _piece(nbytes: int) -> Tensor:
    """Bytes from the start of a large page on. Those that are never written take no memory."""
    # Whatever the caller is in the middle of: who asks next may be elsewhere.
    with torch.inference_mode(mode=False):
        around = torch.empty(nbytes + _PAGE, dtype=torch.uint8, device="cpu")
    advise = _madvise()
    if advise is None:
        return around[:nbytes]
    piece = around[-around.data_ptr() % _PAGE :][:nbytes]
    # Whether it is heeded is the system's to decide: the numbers are the same.
    advise(piece.data_ptr(), nbytes, _MADV_HUGEPAGE)
    return piece


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Linux's `madvise`; None elsewhere, where the advice has other numbers."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    advise: Callable[[int, int, int], int] = found
    return advise
