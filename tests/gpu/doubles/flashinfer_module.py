"""FlashInfer's own wrappers on a CPU. Only the compiled module is a double; arguments, dtypes, shapes, the buffers of graphs
and the refusals are those of the installed version.

Its numbers are those of FlashInfer's reference tests (tests/attention): bottom-right causal, a window that ends on the left,
the cap before the softmax, log-sum-exp in base 2, rows without a key 0 with log-sum-exp -inf.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from gpu.doubles.formula import attention
from gpu.doubles.launch import insist, insist_int32, insist_version, launch
from torch import Tensor

PINNED = "0.7.2.post1"
_EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(eq=False)
class Plan:
    """What `plan` leaves in the int workspace of a wrapper."""

    module: Module
    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_lengths: Tensor
    heads: int
    kv_heads: int
    page_size: int
    causal: bool
    window_left: int

    @property
    def frozen(self) -> tuple[object, ...]:
        """What a captured launch keeps for good."""
        return (self.module, len(self.qo_indptr), self.causal, self.window_left, self.page_size)


class Module:
    """What `get_batch_prefill_module` gives for one combination of dtypes, head sizes and flags."""

    def __init__(
        self,
        backend: str,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        out_dtype: torch.dtype,
        index_dtype: torch.dtype,
        dim_qk: int,
        dim_vo: int,
        positions: int,
        windowed: bool,
        capped: bool,
        fp16_qk: bool,
    ) -> None:
        insist(backend == "fa2", f"the double computes fa2, not {backend}")
        insist(q_dtype in (torch.float16, torch.bfloat16), f"no kernels for queries in {q_dtype}")
        insist(kv_dtype in (q_dtype, *_EIGHT_BIT), f"no kernels for queries in {q_dtype} over keys in {kv_dtype}")
        insist(out_dtype is q_dtype, f"the answer is in {out_dtype}")
        insist(dim_qk == dim_vo and dim_qk in (64, 128, 256), f"no kernels for heads of {dim_qk} and {dim_vo}")
        insist(index_dtype is torch.int32, f"indptr is {index_dtype}")
        insist(positions == 0 and not fp16_qk, "positions in the kernel, or sums in fp16")
        self.dtypes, self.dim, self.windowed, self.capped = (q_dtype, kv_dtype), dim_qk, windowed, capped
        self.plans, self.runs = 0, 0

    def plan(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        pinned: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_lengths: Tensor,
        total_rows: int,
        seqs: int,
        heads: int,
        kv_heads: int,
        page_size: int,
        graph: bool,
        dim_qk: int,
        dim_vo: int,
        causal: bool,
        window_left: int,
        fixed_split: int,
        no_split: bool,
        colocated: int,
        uniform_rows: int,
    ) -> Plan:
        indptrs = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr}
        insist_int32(**indptrs, kv_lengths=kv_lengths)
        for name, indptr in indptrs.items():
            insist(indptr.shape == (seqs + 1,), f"{name} has {len(indptr)} numbers for {seqs} sequences")
            insist(
                indptr[0] == 0 and (indptr.diff() >= 0).all(),
                f"{name} must start at 0 and never fall: {indptr.tolist()}",
            )
        insist(kv_lengths.shape == (seqs,), f"{len(kv_lengths)} lengths for {seqs} sequences")
        insist(heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} key heads")
        insist((window_left >= 0) == self.windowed, "a window of another module")
        insist(dim_qk == dim_vo == self.dim, "a head size of another module")
        insist(qo_indptr[-1] <= total_rows, f"{int(qo_indptr[-1])} rows of at most {total_rows}")
        needed = (kv_lengths + page_size - 1) // page_size
        insist(
            torch.equal(needed, kv_indptr.diff()),
            f"{kv_indptr.diff().tolist()} pages of {page_size} for {kv_lengths.tolist()} keys; is last_page_len at least 1?",
        )
        insist(not (graph and no_split), "a graph without split keys launches past its plan (sglang#31349)")
        insist(
            getattr(float_workspace, "planned", False) or not float_workspace.any(),
            "the first plan needs a workspace of zeros",
        )
        float_workspace.planned = True
        plan = Plan(
            self,
            qo_indptr.clone(),
            kv_indptr.clone(),
            kv_lengths.clone(),
            heads,
            kv_heads,
            page_size,
            causal,
            window_left,
        )
        int_workspace.plan = plan  # as the real one lies there: a wrapper's second plan overwrites its first
        self.plans += 1
        return plan

    def paged_run(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        pages: Tensor,
        last_page_len: Tensor,
        out: Tensor,
        lse: Tensor | None,
        mask_mode: int,
        layout: int,
        window_left: int,
        pdl: bool,
        mask: Tensor | None,
        mask_indptr: Tensor | None,
        alibi: Tensor | None,
        prefix: Tensor | None,
        item_positions: Tensor | None,
        item_lengths: Tensor | None,
        soft_cap: float,
        scale: float,
        *rest: Any,
    ) -> None:
        self._insist_planned(int_workspace, plan, q, k, v, mask_mode, layout, window_left, soft_cap)
        insist_int32(qo_indptr=qo_indptr, kv_indptr=kv_indptr, pages=pages, last_page_len=last_page_len)
        want = (len(k), plan.page_size, plan.kv_heads, self.dim)
        # Unequal strides are another module, which would be compiled when it is first needed.
        insist(k.stride() == v.stride(), "k and v differ in their strides")
        insist(tuple(k.shape) == want and v.shape == k.shape, f"a cache {tuple(k.shape)} where {want} was planned")

        def run() -> None:
            # A replay runs with the pointers of its capture, and with the plan that lies in the workspace by now.
            now: Plan = int_workspace.plan
            insist(now.frozen == plan.frozen, "a wrapper of a graph was planned for another one")
            # What the device reads must be what was planned.
            insist(torch.equal(qo_indptr, now.qo_indptr), "rows were changed since plan()")
            insist(torch.equal(kv_indptr, now.kv_indptr), "pages were changed since plan()")
            for i, length in enumerate(now.kv_lengths.tolist()):
                held = pages[int(kv_indptr[i]) : int(kv_indptr[i + 1])].long()
                insist(((held >= 0) & (held < len(k))).all(), f"a page outside the cache: {held.tolist()}")
                keys = (len(held) - 1) * now.page_size + int(last_page_len[i]) if len(held) else 0
                insist(
                    keys == length,
                    f"sequence {i} has {length} keys, and {keys} by last_page_len {int(last_page_len[i])}",
                )
                rows = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
                # Rows past the last key of a page are garbage in any cache; only what counts is read.
                own = (one[held].float().flatten(0, 1)[:keys] for one in (k, v))
                self._answer(q, *own, rows, out, lse, mask_mode, window_left, soft_cap, scale)

        self.runs += 1
        launch("flashinfer paged_run", run)

    def ragged_run(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        out: Tensor,
        lse: Tensor | None,
        mask_mode: int,
        layout: int,
        window_left: int,
        pdl: bool,
        mask: Tensor | None,
        mask_indptr: Tensor | None,
        alibi: Tensor | None,
        prefix: Tensor | None,
        item_positions: Tensor | None,
        item_lengths: Tensor | None,
        soft_cap: float,
        scale: float,
        *rest: Any,
    ) -> None:
        self._insist_planned(int_workspace, plan, q, k, v, mask_mode, layout, window_left, soft_cap)
        insist_int32(qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        insist(len(k) == len(v) == int(kv_indptr[-1]), f"{len(k)} keys where {int(kv_indptr[-1])} were planned")
        self.runs += 1
        for i in range(len(qo_indptr) - 1):
            rows, keys = (slice(int(at[i]), int(at[i + 1])) for at in (qo_indptr, kv_indptr))
            self._answer(q, k[keys], v[keys], rows, out, lse, mask_mode, window_left, soft_cap, scale)

    def _insist_planned(
        self,
        int_workspace: Tensor,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_mode: int,
        layout: int,
        window_left: int,
        soft_cap: float,
    ) -> None:
        insist(int_workspace.plan is plan, "the wrapper was planned again since; run() has the older plan")
        insist(plan.module is self, "a plan of another module")
        insist(layout == 0, "the cache is NHD")
        insist((soft_cap > 0) == self.capped, "a soft cap of another module")
        insist((mask_mode, window_left) == (int(plan.causal), plan.window_left), "another mask than was planned")
        insist(
            q.shape == (int(plan.qo_indptr.numpy()[-1]), plan.heads, self.dim), f"q {tuple(q.shape)} was not planned"
        )
        insist((q.dtype, k.dtype, v.dtype) == (self.dtypes[0], *self.dtypes[1:] * 2), "dtypes of another module")
        insist(q.is_contiguous(), "q has gaps")
        for one in (k, v):
            # The kernels load 16 bytes at once.
            aligned = all(step * one.itemsize % 16 == 0 for step in (one.storage_offset(), *one.stride()[:-1]))
            insist(one.stride(-1) == 1 and aligned, f"k or v has strides {one.stride()}")

    @staticmethod
    def _answer(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: slice,
        out: Tensor,
        lse: Tensor | None,
        mask_mode: int,
        window_left: int,
        soft_cap: float,
        scale: float,
    ) -> None:
        # The window ends on the left, also where nothing is causal (variants.cuh).
        masking = {"causal": mask_mode == 1, "left": window_left, "soft_cap": soft_cap}
        out[rows], sums = attention(q[rows], k, v, scale=scale, **masking)
        if lse is not None:
            lse[rows] = sums.t() / math.log(2)


class _Unpinned:
    """torch as the wrappers see it: pinned memory, which only the driver of a GPU gives, is plain memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return torch.empty(*sizes, **options)


@contextlib.contextmanager
def flashinfer_on_cpu() -> Iterator[dict[tuple[Any, ...], Module]]:
    """Run FlashInfer's wrappers on CPU tensors. Gives the modules that were made, by what was asked for.

    Raises Misuse for any version but the pinned one, AttributeError where a private name is gone.
    """
    import flashinfer.decode
    import flashinfer.prefill

    insist_version("flashinfer-python", metadata.version("flashinfer-python"), PINNED)
    made: dict[tuple[Any, ...], Module] = {}

    def module(*wanted: Any) -> Module:
        if wanted not in made:
            made[wanted] = Module(*wanted)
        return made[wanted]

    doubles = {"get_batch_prefill_module": module, "device_support_pdl": lambda device: False, "torch": _Unpinned()}
    replaced = [
        (where, name, getattr(where, name), double)
        for where in (flashinfer.prefill, flashinfer.decode)
        for name, double in doubles.items()
    ]
    for where, name, _, double in replaced:
        setattr(where, name, double)
    try:
        yield made
    finally:
        for where, name, before, _ in replaced:
            setattr(where, name, before)
