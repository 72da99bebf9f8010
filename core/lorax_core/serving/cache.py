"""How large the KV cache is.

Decides from what the user asked for and what memory is free. Knows nothing of who will use it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

from lorax_core.attention.base import CacheLayout
from lorax_core.errors import CapacityError, RequestError
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.model import Model

_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn}
# Unasked, a cache takes a quarter of the free memory at most, and no more tokens than a busy small server fills.
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


def cache_dtype(model: Model, size: CacheSize, name: str = "auto") -> torch.dtype:
    """What keys and values are stored in; raises RequestError for options of a cache that the model does not have."""
    if not model.needs_kv_cache and (size.given or name != "auto"):
        raise RequestError("a size or dtype of the KV cache was given, but a bidirectional model has no KV cache")
    return _DTYPES.get(name, model.dtype)


def make_pool(model: Model, size: CacheSize, layout: CacheLayout) -> KVPool | None:
    """The cache of a model, None for a bidirectional one; raises CapacityError when it is larger than what is free."""
    if not model.needs_kv_cache:
        return None
    layers = model.attention_layers
    spec, page_size = layers[0].spec, layout.page_size
    page_bytes = page_size * len(layers) * 2 * spec.kv_heads * spec.head_dim * layout.dtype.itemsize
    free = _free_memory(model.device)
    pages = _pages(size, page_size, page_bytes, free)
    if pages * page_bytes > free:
        raise CapacityError(
            f"a KV cache of {pages * page_size} tokens takes {pages * page_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free",
            hint=f"kv_cache_tokens={int(free * _FRACTION) // page_bytes * page_size} fits in a quarter of that",
        )
    return KVPool(
        layers=len(layers),
        pages=pages + 1,  # and the scratch page
        page_size=page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=layout.dtype,
        device=model.device,
        scales=[(layer.k_scale, layer.v_scale) for layer in layers],
    )


def _pages(size: CacheSize, page_size: int, page_bytes: int, free: int) -> int:
    if size.tokens is not None:
        return -(-size.tokens // page_size)
    if size.pages is not None:
        return size.pages
    if size.bytes is not None:
        wanted = size.bytes // page_bytes
    elif size.fraction is not None:
        wanted = int(free * size.fraction) // page_bytes
    else:
        wanted = max(min(_TOKENS // page_size, int(free * _FRACTION) // page_bytes), 1)
    if wanted < 1:
        raise CapacityError(f"that is less than one page of the KV cache, which takes {page_bytes} bytes")
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
    return peak if sys.platform == "darwin" else peak * 1024


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in names:  # macOS tells only how much there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30
