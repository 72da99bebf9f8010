"""How large the KV cache is.

Decides from what the user asked for and what memory is free. Knows nothing of who will use it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

from lorax_core.errors import CapacityError
from lorax_core.kvcache.pool import KVPool

# By default a cache takes a quarter of the free memory at most, and no more tokens than a busy small server fills.
_FRACTION, _TOKENS = 0.25, 65_536


@dataclass(frozen=True)
class CacheSize:
    """What the user asked for: at most one of these, else the default. `fraction` is of the memory that is free now."""

    tokens: int | None = None
    pages: int | None = None
    bytes: int | None = None
    fraction: float | None = None

    @property
    def given(self) -> bool:
        return any(value is not None for value in vars(self).values())


@dataclass(frozen=True)
class CacheShape:
    """What one page of a model's cache holds, and where; `scales` are those of an 8-bit cache, (K, V) for each layer."""

    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    scales: tuple[tuple[float, float], ...] = ()

    @property
    def page_bytes(self) -> int:
        # 2: K and V.
        return self.page_size * self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


def make_pool(shape: CacheShape, size: CacheSize) -> KVPool:
    """A cache of that size; raises CapacityError when it is larger than the memory that is free."""
    free = _free_memory(shape.device)
    pages = _pages(size, shape, free)
    if pages * shape.page_bytes > free:
        raise CapacityError(
            f"a KV cache of {pages * shape.page_size} tokens takes {pages * shape.page_bytes / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free",
            hint=f"kv_cache_tokens={int(free * _FRACTION) // shape.page_bytes * shape.page_size} fits in a quarter of that",
        )
    try:
        return KVPool(
            layers=shape.layers,
            pages=pages + 1,  # and the scratch page
            page_size=shape.page_size,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=shape.device,
            scales=shape.scales or None,
        )
    except (RuntimeError, MemoryError) as error:  # the process may have a limit of its own, below what is free
        raise CapacityError(
            f"a KV cache of {pages * shape.page_bytes / 1e9:.1f} GB cannot be allocated: {error}",
            hint="kv_cache_tokens=4096 is a small one; or raise the limit of this process (`ulimit -v`)",
        ) from error


def _pages(size: CacheSize, shape: CacheShape, free: int) -> int:
    if size.tokens is not None:
        return -(-size.tokens // shape.page_size)
    if size.pages is not None:
        return size.pages
    if size.bytes is not None:
        wanted = size.bytes // shape.page_bytes
    elif size.fraction is not None:
        wanted = int(free * size.fraction) // shape.page_bytes
    else:
        # At least one page: make_pool() then reports what is missing.
        wanted = max(min(_TOKENS // shape.page_size, int(free * _FRACTION) // shape.page_bytes), 1)
    if wanted < 1:
        raise CapacityError(
            f"that is less than one page of the KV cache, which takes {shape.page_bytes} bytes",
            hint=f"kv_cache_bytes={shape.page_bytes} is the least; the longest request needs more",
        )
    return wanted


def peak_memory(device: str) -> int:
    """The most bytes that this process has held so far: on the device, or altogether on a CPU."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        # (free, total) of the whole device, so memory of other processes is left out.
        return int(torch.cuda.mem_get_info(device)[0])
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in names:  # macOS only knows how much there is in all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30  # 4 GiB where the system does not say (Windows)
