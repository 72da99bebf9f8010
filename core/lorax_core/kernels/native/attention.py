"""The compiled attention over the pages of a cache.

Decides how tensors become the work of `attention.cpp`: the only module that hands their addresses to it. Knows nothing of
backends or schedules; which sequences are worth it is for the caller to decide.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.kernels.elementwise import Angles
from lorax_core.kernels.native.build import load_native
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("attention.cpp")
# Six numbers of 8 bytes in the order of `struct Job`, so the array is handed over as it is.
_JOB = np.dtype([(name, np.int64) for name in ("pages", "row", "rows", "keys", "at", "parts")])
_LEAST_KEYS = 256  # in a part: fewer do not pay for joining it
_PARTS_A_THREAD = 4  # so that threads which get long parts are evened out

Jobs = NDArray[np.void]
"""Work as `struct Job` of the source has it. Addresses hold as long as the page table that they point into."""


class AttentionWork:
    """Jobs and the memory that they share, as a call takes them: looked up once, since a step has a call for each layer."""

    __slots__ = ("address", "count", "jobs", "memory", "scratch")

    def __init__(self, jobs: Jobs, scratch: Tensor) -> None:
        self.jobs, self.scratch = jobs, scratch  # what lies at the addresses
        self.address: int = jobs.ctypes.data
        self.memory: int = scratch.data_ptr()
        self.count = len(jobs)


_NOTHING = AttentionWork(np.zeros(0, _JOB), torch.empty(0))


class Shape(ctypes.Structure):
    """`struct Shape` of the source: what all calls for one kind of layer have in common."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("page_size", "page_stride", "token_stride", "head_stride")),
        *((name, ctypes.c_float) for name in ("cap", "k_scale", "v_scale")),
        ("window", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "slots")),
        *((name, ctypes.c_void_p) for name in ("rotated", "out", "jobs", "scratch")),
        *((name, ctypes.c_int64) for name in ("tokens", "count", "half", "q_row", "k_row", "v_row", "threads")),
    )


def make_jobs(
    table: Tensor, runs: Sequence[tuple[int, int, int]], keys: Sequence[int], window: int | None, threads: int
) -> Jobs:
    """Work for sequences `(row of the table, first row of q, rows)` with so many keys each; `table` is int32 on the host.

    Keys are shared out by the sizes of all jobs and the number of threads, never by the time that anything takes.
    """
    jobs = np.zeros(len(runs), _JOB)
    at, first, rows = np.array(runs, np.int64).T
    lengths = np.array(keys, np.int64)
    # What the first row sees is the most of a job; see `lowest` of the source.
    seen = lengths if window is None else np.minimum(lengths, window + rows)
    share = max(_LEAST_KEYS, -(-int(seen.sum()) // (_PARTS_A_THREAD * threads)))
    jobs["pages"] = table.data_ptr() + at * (table.stride(0) * table.element_size())
    jobs["row"], jobs["rows"], jobs["keys"] = first, rows, lengths
    jobs["parts"] = -(-seen // share)
    ends = np.cumsum(jobs["rows"] * jobs["parts"])
    jobs["at"] = ends - jobs["rows"] * jobs["parts"]
    return jobs


def scratch_size(jobs: Jobs, heads: int, dim: int) -> int:
    """Numbers of float32 that a call with these jobs keeps."""
    return int((jobs["rows"] * jobs["parts"]).sum()) * heads * (dim + 2)


class PagedAttention:
    """Causal attention over pages for float32 or bfloat16 rows, whose cache has their dtype or 8 bits (e4m3), on the CPU."""

    dtypes = (torch.float32, torch.bfloat16)
    most_dim = 256
    lanes = 16

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[torch.dtype, torch.dtype], Callable[..., None]] = {}
        for dtype in self.dtypes:
            for kv_dtype, ending in ((dtype, ""), (torch.float8_e4m3fn, "_fp8")):
                function = getattr(library, f"attend_{str(dtype).removeprefix('torch.')}{ending}")
                function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
                function.restype = None
                self._functions[dtype, kv_dtype] = function

    def supports(self, dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> str | None:
        """None when it computes heads of this size in these dtypes, else the reason why not."""
        if dtype not in self.dtypes:
            return f"it computes in float32 and bfloat16, not in {_plain(dtype)}"
        if (dtype, kv_dtype) not in self._functions:
            return f"it reads a cache of {_plain(dtype)} or float8_e4m3fn, not of {_plain(kv_dtype)}"
        if dim % self.lanes or dim > self.most_dim:
            return f"its heads are a multiple of {self.lanes} wide and at most {self.most_dim}, not {dim}"
        return None

    def attend(self, shape: Shape, q: Tensor, cache: tuple[Tensor, Tensor], work: AttentionWork, out: Tensor) -> None:
        """Attention of the jobs' rows of q `[tokens, heads, dim]` into out, whose other rows stay as they are."""
        assert out.is_contiguous()
        q, (k_cache, v_cache) = _side_by_side(q), cache
        call = _Call(
            *(q.data_ptr(), None, None, None, None, k_cache.data_ptr(), v_cache.data_ptr(), None, None, out.data_ptr()),
            *(work.address, work.memory, q.shape[0], work.count, 0, q.stride(0), 0, 0, torch.get_num_threads()),
        )
        self._functions[q.dtype, k_cache.dtype](ctypes.addressof(shape), ctypes.addressof(call))

    def append_and_attend(
        self,
        shape: Shape,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles | None,
        cache: tuple[Tensor, Tensor],
        slots: Tensor,
        work: AttentionWork,
    ) -> Tensor:
        """Rotate q and k, put k and v at `slots` of a cache of their dtype, and attend: the jobs have all rows of q."""
        out = torch.empty(q.shape, dtype=q.dtype)
        self._append(shape, q, k, v, angles, cache, slots, work, out)
        return out

    def append(
        self,
        shape: Shape,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles | None,
        cache: tuple[Tensor, Tensor],
        slots: Tensor,
    ) -> Tensor:
        """Rotate q and k, and put k and v at `slots` of a cache of their dtype; gives q."""
        return self._append(shape, q, k, v, angles, cache, slots, _NOTHING, None)

    def _append(
        self,
        shape: Shape,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles | None,
        cache: tuple[Tensor, Tensor],
        slots: Tensor,
        work: AttentionWork,
        out: Tensor | None,
    ) -> Tensor:
        """Make a call that appends first; gives q as it is attended with."""
        q, k, v = _side_by_side(q), _side_by_side(k), _side_by_side(v)
        turned, cos, sin, half, rotated = q, None, None, 0, None
        if angles is not None and angles.cos.shape[-1]:  # GPT-NeoX's rotary_pct may be 0
            c, s = angles.cos.contiguous(), angles.sin.contiguous()
            turned = torch.empty(q.shape, dtype=q.dtype)
            cos, sin, half, rotated = c.data_ptr(), s.data_ptr(), c.shape[-1], turned.data_ptr()
        call = _Call(
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), cos, sin, cache[0].data_ptr(), cache[1].data_ptr()),
            *(slots.data_ptr(), rotated, None if out is None else out.data_ptr(), work.address, work.memory),
            *(q.shape[0], work.count, half, q.stride(0), k.stride(0), v.stride(0), torch.get_num_threads()),
        )
        self._functions[q.dtype, k.dtype](ctypes.addressof(shape), ctypes.addressof(call))
        return turned


def _side_by_side(x: Tensor) -> Tensor:
    """Rows may lie apart (parts of a fused projection), but the heads of a row and their numbers must be neighbours."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def load_attention(settings: Settings) -> tuple[PagedAttention | None, str]:
    """The compiled attention and where it lies; or None, and why there is none."""
    native = load_native(SOURCE, settings)
    if native.library is None:
        return None, native.reason
    try:
        return PagedAttention(native.library), native.reason
    except AttributeError as error:
        return None, str(error)
