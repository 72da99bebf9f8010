"""A GPU that is not there, for triton: `pretend_gpu(arch)`.

A launch `kernel[grid](...)` goes through triton's own binder, specialisation, cache and compiler with the ptxas that it
brings, as it would on that GPU; then triton's interpreter computes the kernel on the CPU tensors that it was given. What it
does not show: the numbers of the compiled code, programs running at once, speed.

Made for the triton of `PINNED`, whose private names it replaces: another version may have others, and fails here, loudly.
For one that is not installed: `pip install --no-deps --target DIR triton==3.6.0`, and `PYTHONPATH=DIR` before pytest.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from gpu.doubles.launch import launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers
from triton.runtime import interpreter, jit
from triton.runtime.errors import InterpreterError

PINNED = ("3.6.", "3.7.")
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that one program may have
_CACHE = tempfile.TemporaryDirectory(prefix="triton-")
_device_call = jit.JITFunction.__call__
_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl
_patch_tensor = interpreter._patch_lang_tensor
_interpreted: dict[object, interpreter.InterpretedFunction] = {}


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled: its name, bytes of shared memory, registers, and bytes of local memory (spills)."""

    name: str
    shared: int
    registers: int
    local: int


@dataclass
class PretendedGpu:
    """What happened on the GPU: each launch by name, and each kernel that had to be compiled."""

    arch: int
    computes: bool = True
    launches: list[str] = field(default_factory=list)
    compiled: list[Compiled] = field(default_factory=list)


class _Utils:
    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu

    def load_binary(self, name: str, cubin: bytes, shared: int, device: object) -> tuple[object, object, int, int, int]:
        usage = resources(cubin)
        self.gpu.compiled.append(Compiled(name, shared, usage["REG"], usage["LOCAL"]))
        return object(), object(), usage["REG"], usage["LOCAL"], 1024

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.gpu.arch], "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, source, metadata) -> None:
        self.function, self.name = source.fn.fn, metadata.name

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        gpu = drivers.active.gpu  # of now: triton keeps launchers with what it compiled
        gpu.launches.append(self.name)
        if gpu.computes and x * y * z:
            launch(self.name, lambda: run_interpreted(self.function, (x, y, z), args))


class _Driver:
    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu, self.utils = gpu, _Utils(gpu)

        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.arch, 32)

    def get_current_device(self) -> tuple[str, int]:
        return device(self.gpu.arch)

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def device(arch: int) -> tuple[str, int]:
    """The key of such a GPU in triton's caches: what one test compiled, the next need not."""
    return "pretended", arch


@contextlib.contextmanager
def pretend_gpu(arch: int = 90, *, computes: bool = True) -> Iterator[PretendedGpu]:
    """Triton's kernels are compiled for this compute capability (80: 8.0), and computed here unless told not to."""
    assert triton.__version__.startswith(PINNED), f"made for triton {PINNED}, not for {triton.__version__}"
    gpu = PretendedGpu(arch, computes)
    with rounding_as_a_gpu(), knobs.cache.scope():
        knobs.cache.dir = _CACHE.name
        before = drivers._active
        drivers.set_active(_Driver(gpu))
        try:
            yield gpu
        finally:
            drivers._active = before


def run_interpreted(function, grid: tuple[int, ...], args) -> None:
    """Compute a kernel's Python function on CPU tensors."""
    # Functions that kernels call (tl.cdiv is one) were made for the compiler when they were imported.
    jit.JITFunction.__call__ = _call_interpreted
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # a GPU computes infinity and NaN without a word
            _of(function)[grid](*args)
    except InterpreterError as error:  # which wraps whatever went wrong
        raise (error.__cause__ or error) from None
    finally:
        jit.JITFunction.__call__ = _device_call


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, by the cuobjdump that comes with triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


# --- what triton's interpreter does otherwise than a GPU ---


@contextlib.contextmanager
def rounding_as_a_gpu() -> Iterator[None]:
    """bfloat16 in the interpreter: it multiplies the bits of tl.dot's operands as integers, and cuts where a GPU rounds."""
    builder = interpreter.InterpreterBuilder
    builder.create_dot, builder.cast_impl = _dot_of_bfloat16, _cast_to_nearest
    interpreter._patch_lang_tensor = _patch_lang_tensor
    try:
        yield
    finally:
        builder.create_dot, builder.cast_impl = _dot, _cast
        interpreter._patch_lang_tensor = _patch_tensor


def _dot_of_bfloat16(self, a, b, d, precision, imprecise):
    return _dot(self, _widened(a), _widened(b), d, precision, imprecise)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _patch_lang_tensor(tensor, scope):
    # For triton 3.6, which calls int() of an array of one number; numpy has stopped to allow that.
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _cast_to_nearest(self, source, dtype):
    if not (source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16):
        return _cast(self, source, dtype)
    bits = source.data.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(source.data), np.uint16(0x7FC0), nearest).astype(np.uint16)
    return interpreter.TensorHandle(rounded, tl.bfloat16)


def _of(function):
    if function not in _interpreted:
        _interpreted[function] = interpreter.InterpretedFunction(function)
    return _interpreted[function]


def _call_interpreted(self, *args, **kwargs):
    # Not by calling the interpreted function: that patches the language once more, and leaves it so.
    scope = interpreter._patch_lang(self.fn)
    try:
        return _of(self.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()
