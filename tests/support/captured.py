"""Attention and low-rank products in plain torch that can be captured: all that changes is read from memory that stays.

Slow and plain, they are what graphs are tested with where no kernel of a GPU is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.adapters.lora_kernels.base import GraphLora, Segment
from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.attention.base import AttentionLayer, AttentionRows, AttentionSpec, GraphAttention, KVCache
from lorax_core.attention.torch import TorchBackend


class CapturedAttention(GraphAttention):
    """Every row looks at the whole width of its page table, through a mask a window that `replan` writes."""

    def __init__(self, rows: AttentionRows, cache: KVCache, windows: Sequence[int | None]) -> None:
        assert rows.page_table is not None
        self.rows = rows
        self.cache = cache
        count, width = rows.page_table.device.shape
        self.masks = {window: torch.zeros(count, 1, 1, width * cache.page_size, dtype=torch.bool) for window in windows}
        self.replans = 0

    def replan(self, rows: AttentionRows) -> None:
        self.replans += 1
        for window in self.masks:
            self.replan_window(window, rows)

    def replan_window(self, window: int | None, rows: AttentionRows) -> None:
        """Which keys each row sees in layers of one window."""
        ends = rows.kv_lengths.host[:, None]
        keys = torch.arange(self.masks[window].shape[-1])
        visible = (keys < ends) & (keys >= ends - (window or len(keys)))
        self.masks[window].copy_(visible[:, None, None])

    def write(self, layer: AttentionLayer, k: Tensor, v: Tensor) -> None:
        assert self.rows.slots is not None
        self.cache.write(layer.index, k, v, self.rows.slots)

    def attend(self, layer: AttentionLayer, q: Tensor) -> Tensor:
        assert self.rows.page_table is not None
        spec = layer.spec
        k, v = self.cache.gather(layer.index, self.rows.page_table.device, q.dtype)
        k, v = (one.flatten(1, 2).transpose(1, 2) for one in (k, v))  # [rows, kv_heads, keys, dim]
        grouped = q.reshape(len(q), spec.kv_heads, -1, spec.head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, self.masks[spec.window]).reshape(q.shape)

    def encode(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError("decoding rows have a cache")


class CapturableBackend(TorchBackend):
    """Torch's backend, whose decoding steps can be captured. `attention` makes those; a test may give one with a mistake."""

    name = "capturable"
    attention: type[CapturedAttention] = CapturedAttention

    def bind(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, cache: KVCache | None) -> None:
        super().bind(specs, dtype, cache)
        self.cache = cache
        self.windows = tuple(dict.fromkeys(spec.window for spec in specs))
        self.planned: list[CapturedAttention] = []

    def plan_graph(self, rows: AttentionRows) -> GraphAttention | str:
        assert self.cache is not None
        self.planned.append(self.attention(rows, self.cache, self.windows))
        return self.planned[-1]


class CapturedLora(GraphLora):
    """The updates of each row, padded to one rank, copied into tables that stay; rows without one have zeros."""

    def __init__(self, rows: int, sites: Mapping[str, tuple[int, int]], rank: int) -> None:
        self.rank = rank
        self.a = {path: torch.zeros(rows, rank, width) for path, (width, _) in sites.items()}
        self.b = {path: torch.zeros(rows, rank, width) for path, (_, width) in sites.items()}

    def fits(self, segments: Sequence[Segment]) -> str | None:
        for segment in segments:
            for path, update in segment.updates.by_site.items():
                if path not in self.a:
                    return "an adapter at a layer that is not captured"
                if len(update.a) > self.rank:
                    return f"an adapter of a rank above {self.rank}"
        return None

    def set(self, segments: Sequence[Segment]) -> None:
        for table in (*self.a.values(), *self.b.values()):
            table.zero_()
        for segment in segments:
            for path, update in segment.updates.by_site.items():
                self.a[path][segment.start : segment.stop, : len(update.a)] = update.a
                for block in update.blocks:
                    self.b[path][segment.start : segment.stop, block.ranks, block.columns] = block.b

    def add(self, site: str, x: Tensor, y: Tensor) -> None:
        h = torch.bmm(self.a[site], x[:, :, None])  # [rows, rank, 1]
        y += torch.bmm(h.transpose(1, 2), self.b[site])[:, 0]


class CapturableKernel(TorchKernel):
    """Torch's kernel, whose products can be captured up to a `rank`."""

    name = "capturable"
    lora: type[CapturedLora] = CapturedLora

    def __init__(self, rank: int = 64) -> None:
        self.rank = rank

    def plan_graph(self, rows: int, sites: Mapping[str, tuple[int, int]]) -> GraphLora | str:
        return self.lora(rows, sites, self.rank)
