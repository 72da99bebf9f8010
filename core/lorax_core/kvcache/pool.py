"""The memory of the paged cache.

Decides its layout, one allocation `[layers, 2, pages, page, kv_heads, dim]`, and writes into it. Knows nothing of who owns a
page; backends only read, so all of them share these bytes. Page 0 is scratch: no sequence ever holds it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class KVPool:
    """Keys and values of all layers. A slot is `page * page_size + offset`.

    An 8-bit pool stores numbers divided by `scales`, a pair (K, V) for each layer, and clamped to what the type holds.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.dtype = dtype
        # Zeros, not empty: masked positions are read too, and a weight of 0 times NaN is NaN.
        self.data = _zeros((layers, 2, pages, page_size, kv_heads, head_dim), dtype, torch.device(device))
        self.quantized = dtype.itemsize == 1
        self.scales = list(scales) if scales is not None and self.quantized else [(1.0, 1.0)] * layers

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store k and v `[tokens, kv_heads, dim]` of one layer at `slots` `[tokens]` int64."""
        store = self.data[layer].flatten(1, 2)  # [2, pages * page, kv_heads, dim]
        for place, rows, scale in zip(store, (k, v), self.scales[layer], strict=True):
            if self.quantized:
                # A float8 cast does not saturate: out of range it gives NaN or inf.
                most = torch.finfo(self.dtype).max
                rows = (rows.float() / scale).clamp(-most, most).to(self.dtype)
                # Copied as bytes: not every device indexes 8-bit floats.
                place.view(torch.uint8).index_copy_(0, slots, rows.view(torch.uint8))
            else:
                place.index_copy_(0, slots, rows.to(place.dtype))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer as they are stored, each `[pages, page, kv_heads, dim]`."""
        return self.data[layer, 0], self.data[layer, 1]

    def gather(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of some pages, to compute with: each `[*pages.shape, page, kv_heads, dim]`."""
        k_scale, v_scale = self.scales[layer]
        k, v = self.layer(layer)
        if not self.quantized:
            return k[pages].to(dtype), v[pages].to(dtype)
        return self._dequantized(k, pages, k_scale, dtype), self._dequantized(v, pages, v_scale, dtype)

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages of all layers, `(from, to)` each."""
        if pages:
            old, new = (self._index(side) for side in zip(*pages, strict=True))
            store = self._bytes()
            # The right side is a gathered copy, so a page may be source and target in one call.
            store[:, :, new] = store[:, :, old]

    def zero(self, pages: Sequence[int]) -> None:
        """Zero whole pages of all layers."""
        if pages:
            self._bytes().index_fill_(2, self._index(pages), 0)

    def _index(self, pages: Sequence[int]) -> Tensor:
        # Without waiting for what the device is computing.
        return torch.tensor(list(pages)).to(self.data.device, non_blocking=True)

    def _bytes(self) -> Tensor:
        return self.data.view(torch.uint8) if self.quantized else self.data

    def _dequantized(self, store: Tensor, pages: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return (store.view(torch.uint8)[pages].view(self.dtype).float() * scale).to(dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take memory, and the time to get it, when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The system gives zeros where torch writes them. Not by numpy, which asks for huge pages: each token is in many places.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        memory = mmap.mmap(-1, max(prod(shape) * dtype.itemsize, 1), **private)
    except OSError as error:
        raise MemoryError(str(error)) from error
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)
