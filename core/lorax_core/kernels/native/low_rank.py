"""The compiled product of many low-rank updates, where this machine has a compiler.

Decides how `low_rank.cpp` becomes a library: once for each machine and compiler, kept in the cache folder, tried on a small
product before it is trusted. Without a compiler, or where anything fails, there is none, and the plain products serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("low_rank.cpp")
PIECE = np.dtype([(name, np.int64) for name in ("a", "b", "row", "rows", "rank", "column", "width", "at")])
"""One piece of work, as `struct Piece` of the source has it: addresses, then numbers."""

# Fast where it is harmless: sums may be ordered freely, but NaN stays NaN.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 120  # seconds
_log = logging.getLogger(__name__)


class NativeProduct:
    """A loaded library."""

    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[torch.dtype, Callable[..., None]] = {}
        for dtype in self.dtypes:
            function = getattr(library, f"low_rank_{str(dtype).removeprefix('torch.')}")
            address, number = ctypes.c_void_p, ctypes.c_int64
            function.argtypes = [address, number, address, number, number, address, number, address, ctypes.c_int]
            function.restype = None
            self._functions[dtype] = function

    def add(self, x: Tensor, y: Tensor, pieces: NDArray[np.void], scratch: int) -> None:
        """Add to y `[rows, out]` what the pieces make of x `[rows, in]`; both on the CPU, of one dtype, rows contiguous.

        `scratch` numbers of float32 are needed between the two halves of the products.
        """
        between = torch.empty(scratch)
        self._functions[x.dtype](
            *(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), x.shape[1]),
            *(pieces.ctypes.data, len(pieces), between.data_ptr(), torch.get_num_threads()),
        )


def load_native() -> NativeProduct | None:
    """The compiled product of this machine, None where there is none."""
    return native_status()[0]


@functools.cache
def native_status() -> tuple[NativeProduct | None, str]:
    """The compiled product, and where it lies; or None, and why there is none."""
    settings = Settings.from_env()
    if not settings.native:
        return None, "LORAX_NATIVE is off"
    try:
        library = _built(settings.cache.expanduser() / "native")
        product = NativeProduct(ctypes.CDLL(str(library)))
        if _works(product):
            return product, str(library)
        reason = "it gives wrong numbers on this machine"
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        reason = str(error)
    _log.info("adapters are computed without the compiled product: %s", reason)
    return None, reason


def _built(folder: Path) -> Path:
    """The library, compiled unless the cache has it."""
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"none of the compilers {', '.join(_COMPILERS)} is installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT).stdout
    # A library is made for the processor that made it, and a home may be shared by several.
    told = (SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, _processor())
    library = folder / f"low_rank-{hashlib.sha256(b'|'.join(told)).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch) / "low_rank.o", Path(scratch) / "low_rank.so"
        # Linked on its own, without an OpenMP library: torch's is in the process already, and two would fight for the cores.
        for command in (
            [compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
        os.replace(linked, library)
    return library


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def _works(product: NativeProduct) -> bool:
    """Whether a small product comes out right, in every dtype."""
    x, a = torch.linspace(-1, 1, 26).view(2, 13), torch.linspace(1, -2, 65).view(5, 13)
    b, y = torch.linspace(-1, 2, 35).view(5, 7), torch.linspace(0, 1, 16).view(2, 8)
    for dtype in product.dtypes:
        tensors = [tensor.to(dtype) for tensor in (x, a, b, y)]
        expected = tensors[3].float().clone()
        expected[:, 1:] += tensors[0].float() @ tensors[1].float().t() @ tensors[2].float()
        piece = (tensors[1].data_ptr(), tensors[2].data_ptr(), 0, 2, 5, 1, 7, 0)
        product.add(tensors[0], tensors[3], np.array([piece], PIECE), 10)
        if not torch.allclose(tensors[3].float(), expected, rtol=1e-5 if dtype is torch.float32 else 1e-2):
            return False
    return True
