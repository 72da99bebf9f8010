"""The compiled product of many low-rank updates.

Decides how tensors become the work of `low_rank.cpp`: the only module that hands their addresses to it. Knows nothing of
adapters or sites; which work is worth a call is for the caller to decide.
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

from lorax_core.kernels.native.build import load_native
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("low_rank.cpp")
# Eight numbers of 8 bytes in the order of `struct Job`, so the array is handed over as it is.
_JOB = np.dtype([(name, np.int64) for name in ("a", "b", "row", "rows", "rank", "column", "width", "at")])

Jobs = NDArray[np.void]
"""Work as `struct Job` of the source has it. Addresses hold as long as the tensors that they were made of."""


class LowRankWork:
    """The jobs of one call, as it takes them: looked up once, since a step has a call at every site."""

    __slots__ = ("address", "count", "jobs")

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs  # whose memory lies at the address
        self.address: int = jobs.ctypes.data
        self.count = len(jobs)


class LowRankProduct:
    """`y += (x A^T) B^T` for many pairs in one call, over float32 or bfloat16 on the CPU."""

    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[torch.dtype, Callable[..., None]] = {}
        for dtype in self.dtypes:
            function = getattr(library, f"low_rank_{str(dtype).removeprefix('torch.')}")
            address, number = ctypes.c_void_p, ctypes.c_int64
            function.argtypes = [address, number, address, number, number, address, number, address, ctypes.c_int]
            function.restype = None
            self._functions[dtype] = function

    @staticmethod
    def jobs(pairs: Sequence[tuple[Tensor, Tensor, int]]) -> Jobs:
        """A job for each `(a [rank, in], b [rank, width], first column of y)`; which rows it is for is filled in later."""
        rows = [(a.data_ptr(), b.data_ptr(), 0, 0, len(a), column, b.shape[1], 0) for a, b, column in pairs]
        return np.array(rows, _JOB)

    def add(self, x: Tensor, y: Tensor, work: LowRankWork, scratch: Tensor) -> None:
        """Add to y `[rows, out]` what the jobs make of x `[rows, in]`, both of one dtype.

        `scratch` holds `rows * rank` numbers of float32 for each job, from the job's `at` on.
        """
        assert x.dtype is y.dtype, f"x is {x.dtype} and y {y.dtype}"
        if y.stride(-1) != 1:
            # Not `contiguous()`: for one column it gives the same strides back.
            self.add(x, whole := torch.empty(y.shape, dtype=y.dtype).copy_(y), work, scratch)
            y.copy_(whole)
            return
        # Rows may lie apart (a slice of a fused output), but the numbers of a row must be neighbours.
        x = x if x.stride(-1) == 1 else x.contiguous()
        self._functions[x.dtype](
            *(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), x.shape[1]),
            *(work.address, work.count, scratch.data_ptr(), torch.get_num_threads()),
        )


@functools.cache
def load_low_rank(settings: Settings) -> tuple[LowRankProduct | None, str]:
    """The compiled product and where it lies; or None, and why there is none."""
    native = load_native(SOURCE, settings)
    if native.library is None:
        return None, native.reason
    try:
        return LowRankProduct(native.library), native.reason
    except AttributeError as error:
        return None, str(error)
