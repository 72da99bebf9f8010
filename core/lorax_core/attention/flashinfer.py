"""Attention by FlashInfer, on NVIDIA GPUs.

Decides which of its wrappers a kind of layer needs and what each is told of a step. Decoding rows are prompt chunks of one row
here: `fa2` computes them on tensor cores, and one compiled module serves both. FlashInfer compiles its modules at first use
unless built ones lie beside it, so what that takes is probed before a model is loaded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

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
from lorax_core.attention.staging import Staging
from lorax_core.kernels.gpu import compute_capability

PAGE_SIZE = 16
HEAD_SIZES = (64, 128, 256)


class FlashInferStep(PagedStep, GraphAttention):
    """One step, planned for every kind of layer; also one that is captured, when its wrappers keep their memory."""

    def __init__(self, backend: FlashInferBackend, wrappers: Mapping[AttentionSpec, Any], rows: AttentionRows) -> None:
        super().__init__(backend.cache, rows.slots)
        self._backend = backend
        self._wrappers = wrappers

    def replan(self, rows: AttentionRows) -> None:
        # Every kind of layer, each time: a wrapper that is left out replays the lengths of an older step.
        self._backend.prepare(self._wrappers, rows)

    def attend(self, layer: AttentionLayer, q: Tensor) -> Tensor:
        k_scale, v_scale = self.cache.scales[layer.index]
        stored = self.cache.layer(layer.index)
        q = q.contiguous()
        # Made here: FlashInfer fills what it makes with zeros, a launch a layer, and every row is written.
        out = torch.empty_like(q)  # [tokens, heads, dim]
        self._wrappers[layer.spec].run(q, stored, out=out, k_scale=k_scale, v_scale=v_scale)
        return out

    def encode(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # k and v may have gaps: its ragged kernels take the strides of each.
        out: Tensor = self._wrappers[layer.spec].run(q.contiguous(), k, v)
        return out


class FlashInferBackend(AttentionBackend):
    """FlashInfer's paged attention for causal layers, its ragged attention for bidirectional ones."""

    name = "flashinfer"
    kernels: ClassVar[str] = "fa2"
    """Which of FlashInfer's kernels. "fa3" is for Hopper, and has none for an 8-bit cache."""
    workspace_bytes: ClassVar[int] = 256 << 20
    """For partial results of long sequences. FlashInfer suggests 128 MiB; graphs are planned for their worst step."""

    def __init__(self) -> None:
        self.cache: KVCache | None = None
        self._dtype = torch.bfloat16
        self._specs: tuple[AttentionSpec, ...] = ()
        self._wrappers: dict[AttentionSpec, Any] = {}
        self._workspace: Tensor | None = None
        self._staging: Staging | None = None

    @classmethod
    def is_available(cls) -> tuple[bool, str]:
        if find_spec("flashinfer") is None:
            return False, "flashinfer-python is not installed"
        missing = cls.missing_tools()
        if not missing or _any_built():
            return True, ""
        return False, f"compiles its kernels, and finds no {', no '.join(missing)}; nor is there any built module"

    def layout(
        self,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: str,
        page_size: int | None = None,
    ) -> CacheLayout | str:
        reason = self._why_not(dtype, kv_dtype, self.capability(device))
        for spec in dict.fromkeys(specs):
            reason = reason or _why_not_layer(spec)
        missing = () if reason else self.missing_tools()
        for spec in dict.fromkeys(specs) if missing else ():
            if not reason and not self.is_built(spec, dtype, kv_dtype if spec.causal else dtype):
                reason = f"has no built module for {_described(spec)}, and to compile one no {', no '.join(missing)}"
        return reason or CacheLayout(page_size or PAGE_SIZE, kv_dtype)

    def _why_not(self, dtype: torch.dtype, kv_dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 and float16, not in {dtype}"
        eight_bit = kv_dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        if kv_dtype is not dtype and not eight_bit:
            return f"has no kernel for keys and values in {kv_dtype} under queries in {dtype}"
        if eight_bit and self.kernels != "fa2":
            return f"has no {self.kernels} kernel for keys and values in {kv_dtype}, only fa2"
        least = (8, 0) if dtype is torch.bfloat16 else (7, 5)
        if capability is not None and capability < least:
            return f"needs compute capability {_dotted(least)} for {dtype}, and this GPU has {_dotted(capability)}"
        return None

    def bind(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, cache: KVCache | None) -> None:
        self.cache = cache
        self._dtype = dtype
        self._specs = tuple(dict.fromkeys(specs))
        self._wrappers.clear()

    def plan(self, rows: AttentionRows) -> StepAttention:
        for spec in self._specs:
            if spec not in self._wrappers:
                self._wrappers[spec] = self._wrapper(spec, rows.query_starts.device.device)
        self.prepare(self._wrappers, rows)
        return FlashInferStep(self, self._wrappers, rows)

    def plan_graph(self, rows: AttentionRows) -> GraphAttention | str:
        if not self._specs or not all(spec.causal for spec in self._specs):
            return "bidirectional layers have no decoding steps"
        assert rows.page_table is not None, "a causal model's rows have no page table"
        device = rows.query_starts.device.device
        wrappers = {spec: self._wrapper(spec, device, graph=rows.page_table.device.shape) for spec in self._specs}
        try:
            self.prepare(wrappers, rows)
        # FlashInfer raises RuntimeError when its memory is too small for the worst step of a graph.
        except RuntimeError as error:
            return f"FlashInfer cannot plan {rows.page_table.device.shape[0]} rows for a graph: {error}"
        return FlashInferStep(self, wrappers, rows)

    def prepare(self, wrappers: Mapping[AttentionSpec, Any], rows: AttentionRows) -> None:
        """Plan the step of these rows on some wrappers, one of each kind of layer."""
        if self._staging is None:
            self._staging = Staging.of(rows.query_starts.device.device)
        starts = rows.query_starts.host
        tables = {window: self._table(rows, window) for window in {spec.window for spec in wrappers if spec.causal}}
        size = len(starts) + sum(len(part) for table in tables.values() for part in table)
        with self._staging.rows(size) as put:
            starts = put(starts)
            placed = {window: tuple(put(part) for part in table) for window, table in tables.items()}
            for spec, wrapper in wrappers.items():
                if spec.causal:
                    self._plan_paged(spec, wrapper, starts, *placed[spec.window])
                else:
                    self._plan_ragged(spec, wrapper, starts)

    def _plan_paged(
        self,
        spec: AttentionSpec,
        wrapper: Any,
        starts: Tensor,
        indptr: Tensor,
        pages: Tensor,
        last: Tensor,
        keys: Tensor,
    ) -> None:
        assert self.cache is not None, "bind() comes before plan()"
        wrapper.plan(
            starts,
            indptr,
            pages,
            last,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            self.cache.page_size,
            causal=True,
            window_left=-1 if spec.window is None else spec.window - 1,
            logits_soft_cap=spec.soft_cap,
            q_data_type=self._dtype,
            kv_data_type=self.cache.layer(0)[0].dtype,
            seq_lens=keys,
        )

    def _plan_ragged(self, spec: AttentionSpec, wrapper: Any, starts: Tensor) -> None:
        wrapper.plan(
            starts,
            starts,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            causal=False,
            logits_soft_cap=spec.soft_cap,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

    def _table(self, rows: AttentionRows, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pages that layers of a window read: where each sequence's begin `[seqs + 1]`, the pages themselves, the keys on
        each last one and on all of a sequence's `[seqs]`."""
        assert self.cache is not None, "bind() comes before plan()"
        assert rows.page_table is not None, "a causal model's rows have no page table"
        size, table = self.cache.page_size, rows.page_table.host
        keys = rows.kv_lengths.host
        first = torch.zeros_like(keys)
        if window is not None:
            # The first row's oldest visible key is at past + 1 - window. Positions count from the last key, so pages before
            # that one can be left out; they may hold another sequence by now.
            past = keys - rows.query_starts.host.diff()
            first = (past + 1 - window).clamp(min=0) // size
        keys = keys - first * size
        count = (keys + size - 1) // size
        # A captured step's table is as wide as any can be; most of it is never looked at.
        at = torch.arange(int((first + count).max()), dtype=torch.int32)
        pages = table[:, : len(at)][(at >= first[:, None]) & (at < (first + count)[:, None])]
        indptr = torch.zeros(len(keys) + 1, dtype=torch.int32)
        indptr[1:] = count.cumsum(0)
        # 1 to `size`: a full last page has `size` keys, not 0.
        return indptr, pages, (keys - 1) % size + 1, keys

    def _wrapper(self, spec: AttentionSpec, device: torch.device, graph: Sequence[int] | None = None) -> Any:
        """A wrapper for one kind of layer. Each has a plan of its own, so those of several kinds stand side by side.

        `graph` is the shape of the page table of a captured step, whose memory then stays where it is.
        """
        if self._workspace is None:
            # Zeros: the kernels' counters start at what lies there. Shared, as layers run one after the other.
            self._workspace = torch.zeros(self.workspace_bytes, dtype=torch.uint8, device=device)
        prefill = import_module("flashinfer.prefill")
        if not spec.causal:
            return prefill.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend=self.kernels)
        buffers: dict[str, Any] = {}
        if graph is not None:
            seqs, width = graph
            sizes = {"qo_indptr": seqs + 1, "paged_kv_indptr": seqs + 1, "paged_kv_indices": seqs * width}
            sizes["paged_kv_last_page_len"] = seqs
            buffers = {f"{name}_buf": torch.zeros(n, dtype=torch.int32, device=device) for name, n in sizes.items()}
            buffers["use_cuda_graph"] = True
        return prefill.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=self.kernels, **buffers)

    def is_built(self, spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
        """Whether a built module for a kind of layer lies beside FlashInfer."""
        # Those that the wrappers load; of fa2's there are two, and all that is done here is in the first.
        generator = "_gen_batch_prefill_primary_module" if self.kernels == "fa2" else "gen_batch_prefill_module"
        generate: Callable[..., Any] = getattr(import_module("flashinfer.prefill"), generator)
        windowed, capped = spec.window is not None, spec.soft_cap is not None
        sizes = (spec.head_dim, spec.head_dim)
        module = generate(self.kernels, dtype, kv_dtype, dtype, torch.int32, *sizes, 0, windowed, capped, False)
        return bool(module.is_aot)

    @staticmethod
    def capability(device: str) -> tuple[int, int] | None:
        """The compute capability of the GPU, which decides what it can run; None off a GPU."""
        return compute_capability(device)

    @staticmethod
    def missing_tools() -> tuple[str, ...]:
        """What compiling takes and this machine lacks."""
        return missing_tools()


def missing_tools() -> tuple[str, ...]:
    """What FlashInfer needs to compile its kernels and this machine lacks: nvcc, ninja, a C++ compiler."""
    # As FlashInfer looks for them: nvcc below CUDA_HOME, the others on the PATH.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home, "bin/nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    found = {
        "nvcc": nvcc.is_file(),
        "ninja": shutil.which("ninja") is not None,
        "C++ compiler": shutil.which(os.environ.get("CXX") or "c++") is not None,
    }
    return tuple(name for name, there in found.items() if not there)


def _any_built() -> bool:
    """Whether any module was built ahead of time, by an installed package or by hand."""
    folders: Sequence[Path] = import_module("flashinfer.jit.env").FLASHINFER_AOT_DIRS
    return any(next(Path(folder).glob("*/*.so"), None) is not None for folder in folders)


def _why_not_layer(spec: AttentionSpec) -> str | None:
    if spec.head_dim not in HEAD_SIZES:
        return f"has kernels for heads of {', '.join(map(str, HEAD_SIZES))}, not of {spec.head_dim}"
    if not spec.causal and spec.window is not None:
        return f"has windows that end on the left only; bidirectional layers with a window of {spec.window} need both sides"
    return None


def _described(spec: AttentionSpec) -> str:
    window = "" if spec.window is None else ", with a window"
    return f"heads of {spec.head_dim}{window}{'' if spec.soft_cap is None else ', with a soft cap'}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
