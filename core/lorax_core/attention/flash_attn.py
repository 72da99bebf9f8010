"""Attention by FlashAttention 2, on NVIDIA GPUs: from the package flash-attn where it can be imported, else from torch.

Decides which calls a step takes. Both packagings have the same kernels, which read pages of 256 tokens; what one of them
cannot do is refused with the reason. Lengths and pages are read on the device, so nothing is uploaded for a step.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from lorax_core.attention.base import (
    AttentionBackend,
    AttentionLayer,
    AttentionRows,
    AttentionSpec,
    CacheLayout,
    GraphAttention,
    KVCache,
    PagedStep,
    StepAttention,
)
from lorax_core.kernels.gpu import compute_capability

PAGE_SIZE = 256
"""The kernels take multiples of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences that one call computes. Of a captured step the bounds are those of any step that may be replayed."""

    rows: Tensor | None  # [rows] int64: which rows of the step; None for all
    starts: Tensor  # [seqs + 1] int32: first row of each sequence, counted within the part
    lengths: Tensor  # [seqs] int32: keys of each
    ends: Tensor  # [seqs + 1] int32: 0, then the sums of lengths
    pages: Tensor | None  # [seqs, most pages] int32
    most_rows: int
    most_keys: int


class Packaging(ABC):
    """One way to call FlashAttention 2."""

    decodes_apart: ClassVar[bool]
    """Whether sequences of one row have a function of their own."""

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be imported here; None when it can."""

    @abstractmethod
    def why_not(self, spec: AttentionSpec) -> str | None:
        """Why it cannot compute a kind of layer that the kernels themselves can."""

    @abstractmethod
    def paged(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Causal attention over keys and values `[pages, page, kv_heads, dim]`."""

    @abstractmethod
    def encode(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Bidirectional attention inside each sequence."""


class FlashAttnPackage(Packaging):
    """The package flash-attn, of any version that takes what a model needs.

    Decoding rows split their keys over the GPU, as prompts have no need to.
    """

    decodes_apart = True

    def __init__(self) -> None:
        package = import_module("flash_attn")
        self._varlen: Callable[..., Tensor] = package.flash_attn_varlen_func
        self._with_cache: Callable[..., Tensor] = package.flash_attn_with_kvcache

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("flash_attn") is None:
            return "flash-attn is not installed"
        try:
            import_module("flash_attn")
        # Whatever a package that was compiled for another torch raises.
        except Exception as error:
            return f"flash-attn cannot be imported: {type(error).__name__}: {error}"
        return None

    def why_not(self, spec: AttentionSpec) -> str | None:
        needed = {"window_size"} | ({"block_table"} if spec.causal else set()) | set(_capped(spec))
        return _lacking("flash_attn_varlen_func of this flash-attn", self._varlen, needed)

    def paged(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        masking = {"causal": True, "window_size": _causal_window(spec), **_capped(spec)}
        if part.most_rows == 1:
            seqs = {"cache_seqlens": part.lengths, "block_table": part.pages}
            return self._with_cache(q.unsqueeze(1), k, v, **seqs, **masking).squeeze(1)
        bounds = (part.starts, part.ends, part.most_rows, part.most_keys)
        return self._varlen(q, k, v, *bounds, block_table=part.pages, **masking)

    def encode(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        bounds = (part.starts, part.starts, part.most_rows, part.most_rows)
        return self._varlen(q, k, v, *bounds, window_size=_encoder_window(spec), **_capped(spec))


class TorchVarlen(Packaging):
    """`torch.nn.attention.varlen`. What its function takes differs from one torch to the next, so its signature is asked."""

    decodes_apart = False

    def __init__(self) -> None:
        self._varlen: Callable[..., Tensor] = import_module("torch.nn.attention.varlen").varlen_attn

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        return None if cls.compiled() else f"torch {torch.__version__} was built without FlashAttention"

    @staticmethod
    def compiled() -> bool:
        """Whether this torch has the kernels."""
        return bool(torch.backends.cuda.is_flash_attention_available())

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.soft_cap is not None:
            return "torch's FlashAttention has no soft cap, and flash-attn, which has, cannot be imported"
        # A window is needed for causality, too.
        needed = {"window_size"} if spec.causal or spec.window is not None else set()
        if spec.causal:
            needed |= {"block_table", "seqused_k", "num_splits"}
        if spec.heads != spec.kv_heads:
            needed.add("enable_gqa")
        return _lacking(f"varlen_attn of torch {torch.__version__}", self._varlen, needed)

    def paged(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        return self._varlen(
            q,
            k,
            v,
            part.starts,
            part.ends,
            part.most_rows,
            part.most_keys,
            window_size=_causal_window(spec),
            seqused_k=part.lengths,
            block_table=part.pages,
            # Over pages the kernel that splits keys leaves rows unwritten (pytorch#194167).
            num_splits=1,
            **self._grouped(spec),
        )

    def encode(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        window = {} if spec.window is None else {"window_size": _encoder_window(spec)}
        bounds = (part.starts, part.starts, part.most_rows, part.most_rows)
        return self._varlen(q, k, v, *bounds, **window, **self._grouped(spec))

    def _grouped(self, spec: AttentionSpec) -> dict[str, bool]:
        return {"enable_gqa": True} if spec.heads != spec.kv_heads else {}


class FlashAttnStep(PagedStep):
    """One step: a call for all sequences, or one for those that decode and one for the others."""

    def __init__(
        self, packaging: Packaging, cache: KVCache | None, slots: Tensor | None, parts: Sequence[Part]
    ) -> None:
        super().__init__(cache, slots)
        self._packaging = packaging
        self._parts = parts

    def attend(self, layer: AttentionLayer, q: Tensor) -> Tensor:
        compute = partial(self._packaging.paged, layer.spec)
        k, v = self.cache.layer(layer.index)
        if len(self._parts) == 1:
            return compute(q, k, v, self._parts[0])
        out = torch.empty_like(q)  # [tokens, heads, dim]
        for part in self._parts:
            assert part.rows is not None, "one of several parts has all rows"
            out[part.rows] = compute(q[part.rows], k, v, part)
        return out

    def encode(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (part,) = self._parts
        return self._packaging.encode(layer.spec, q, k, v, part)


class FlashAttnGraph(FlashAttnStep, GraphAttention):
    """A captured step. Its calls read the step's own tensors, which stay where they are; only sums of lengths are made."""

    def replan(self, rows: AttentionRows) -> None:
        (part,) = self._parts
        torch.cumsum(rows.kv_lengths.device, 0, dtype=torch.int32, out=part.ends[1:])


class FlashAttnBackend(AttentionBackend):
    """FlashAttention 2 over pages of 256 tokens, and inside the sequences of bidirectional models."""

    name = "flash_attn"
    packagings: ClassVar[tuple[type[Packaging], ...]] = (FlashAttnPackage, TorchVarlen)
    """The first that can be imported is used."""

    def __init__(self) -> None:
        self._packaging = next(packaging() for packaging in self.packagings if packaging.missing() is None)
        self._cache: KVCache | None = None

    @classmethod
    def is_available(cls) -> tuple[bool, str]:
        reasons = [packaging.missing() for packaging in cls.packagings]
        return (True, "") if None in reasons else (False, "; ".join(filter(None, reasons)))

    def layout(
        self,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: str,
        page_size: int | None = None,
    ) -> CacheLayout | str:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 and float16, not in {dtype}"
        paged = any(spec.causal for spec in specs)
        if paged and kv_dtype is not dtype:
            return f"reads keys and values in the dtype of the queries, {dtype}, not in {kv_dtype}"
        capability = self.capability(device)
        if capability is not None and capability < (8, 0):
            return f"needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
        if paged and page_size is not None and page_size % PAGE_SIZE:
            return f"reads pages of a multiple of {PAGE_SIZE} tokens, not of {page_size}"
        for spec in dict.fromkeys(specs):
            if spec.head_dim % 8 or spec.head_dim > 256:
                return f"has kernels for heads of a multiple of 8, at most 256, not of {spec.head_dim}"
            if reason := self._packaging.why_not(spec):
                return reason
        return CacheLayout(page_size or PAGE_SIZE, kv_dtype)

    def bind(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, cache: KVCache | None) -> None:
        self._cache = cache

    def plan(self, rows: AttentionRows) -> StepAttention:
        counts = rows.query_starts.host.diff().tolist()
        single = [i for i, count in enumerate(counts) if count == 1]
        if rows.page_table is None or not self._packaging.decodes_apart or len(single) in (0, len(counts)):
            return FlashAttnStep(self._packaging, self._cache, rows.slots, [_whole(rows, max(counts))])
        others = [i for i, count in enumerate(counts) if count > 1]
        parts = [_part(rows, which) for which in (single, others)]
        return FlashAttnStep(self._packaging, self._cache, rows.slots, parts)

    def plan_graph(self, rows: AttentionRows) -> GraphAttention | str:
        if rows.page_table is None or self._cache is None:
            return "bidirectional layers have no decoding steps"
        bound = rows.page_table.device.shape[1] * self._cache.page_size
        return FlashAttnGraph(self._packaging, self._cache, rows.slots, [_whole(rows, 1, bound)])

    @staticmethod
    def capability(device: str) -> tuple[int, int] | None:
        """The compute capability of the GPU, which decides what it can run; None off a GPU."""
        return compute_capability(device)


def _whole(rows: AttentionRows, most_rows: int, most_keys: int | None = None) -> Part:
    """All sequences of a step."""
    lengths = rows.kv_lengths.device
    pages = None if rows.page_table is None else rows.page_table.device
    most_keys = most_keys or int(rows.kv_lengths.host.max())
    return Part(None, rows.query_starts.device, lengths, _ends(lengths), pages, most_rows, most_keys)


def _part(rows: AttentionRows, which: Sequence[int]) -> Part:
    """Some sequences of a step."""
    assert rows.page_table is not None, "a causal model's rows have no page table"
    starts: list[int] = rows.query_starts.host.tolist()
    runs = list(pairwise(starts))
    device = rows.query_starts.device.device
    counts = [runs[i][1] - runs[i][0] for i in which]
    chosen = [row for i in which for row in range(*runs[i])]
    at = torch.tensor([*which, *chosen, *counts]).to(device, non_blocking=True)
    sequences, picked, sizes = at[: len(which)], at[len(which) : -len(which)], at[-len(which) :]
    lengths = rows.kv_lengths.device[sequences]
    longest = int(rows.kv_lengths.host[list(which)].max())
    pages = rows.page_table.device[sequences]
    return Part(picked, _ends(sizes), lengths, _ends(lengths), pages, max(counts), longest)


def _ends(sizes: Tensor) -> Tensor:
    """0, then the sums of sizes: `[len(sizes) + 1]` int32."""
    ends = torch.zeros(len(sizes) + 1, dtype=torch.int32, device=sizes.device)
    torch.cumsum(sizes, 0, dtype=torch.int32, out=ends[1:])
    return ends


def _lacking(name: str, function: Callable[..., Tensor], needed: set[str]) -> str | None:
    """Which of the arguments that are needed a function does not take; None when it takes them all."""
    missing = sorted(needed - set(inspect.signature(function).parameters))
    return f"{name} has no {', no '.join(missing)}" if missing else None


def _capped(spec: AttentionSpec) -> dict[str, float]:
    return {} if spec.soft_cap is None else {"softcap": spec.soft_cap}


def _causal_window(spec: AttentionSpec) -> tuple[int, int]:
    """Keys to the left and to the right of a query, itself left out; -1 is all of them."""
    return (-1 if spec.window is None else spec.window - 1), 0


def _encoder_window(spec: AttentionSpec) -> tuple[int, int]:
    side = -1 if spec.window is None else spec.window - 1
    return side, side
