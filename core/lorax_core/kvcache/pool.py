"""The memory of the paged cache.

Decides its layout, one allocation `[layers, 2, pages, page, kv_heads, dim]`, and writes into it. Knows nothing of who owns a
page; backends only read, so all of them share these bytes. Page 0 is scratch: no sequence ever holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVPool:
    """Keys and values of all layers. A slot is `page * page_size + offset`."""

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
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.data = torch.zeros(layers, 2, pages, page_size, kv_heads, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store k and v `[tokens, kv_heads, dim]` of one layer at `slots` `[tokens]` int64."""
        store = self.data[layer].flatten(1, 2)  # [2, pages * page, kv_heads, dim]
        store[0].index_copy_(0, slots, k.to(store.dtype))
        store[1].index_copy_(0, slots, v.to(store.dtype))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each `[pages, page, kv_heads, dim]`."""
        return self.data[layer, 0], self.data[layer, 1]
