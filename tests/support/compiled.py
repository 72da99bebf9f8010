"""Native sources compiled for other processors than that of this machine."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import pytest

from lorax_core.kernels.native.build import FLAGS
from lorax_core.kernels.native.compiler import find_compiler

STRICT = ("-Wall", "-Wextra", "-Werror")
only_on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86")


def compiled_for_avx2(source: Path, folder: Path, level: str = "x86-64-v3") -> ctypes.CDLL:
    """The library of a source for processors that have AVX2 and no more, or of another level; a warning is an error."""
    library = folder / f"{source.stem}.so"
    flags = [flag for flag in FLAGS if flag != "-march=native"]
    target = (f"-march={level}", "-shared", str(source), "-o", str(library))
    find_compiler(os.geteuid()).run(*flags, *STRICT, *target, folder=folder)
    return ctypes.CDLL(str(library))
