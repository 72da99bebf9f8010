"""Guards that watch tensors while some code runs: what it reads back to the host, and what it makes from the host's numbers.

On a CPU nothing would go wrong; on a GPU each of these waits for the device, and none of them can be in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lorax_core

CORE = Path(lorax_core.__file__).parent
KERNELS = CORE / "kernels"
READS = ("tolist", "numpy", "item", "cpu", "cuda", "__bool__", "__int__", "__float__", "__index__", "__array__")
MAKES = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, torch.scalar_tensor)
# Operators that wait for the device: their results, or the shapes of these, depend on numbers in it.
WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::lift_fresh",
    "aten::bincount",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
)


class HostTraffic(AssertionError):
    """Something went between device and host that must not."""


def _has_mask(args) -> bool:
    """Whether an operator indexes with a mask: how many rows that gives is known only on the device."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _names_a_device(args, kwargs) -> bool:
    """Whether `Tensor.to` was given a device, or another tensor to follow."""
    given = [*args, *(kwargs or {}).values()]
    return any(isinstance(one, str | int | torch.device | torch.Tensor) and not isinstance(one, bool) for one in given)


class _Functions(TorchFunctionMode):
    """Calls of torch's Python functions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in MAKES:
            raise HostTraffic(f"a tensor is made of host values: torch.{func.__name__}")
        name = getattr(func, "__name__", "")
        if name in READS or (name == "to" and _names_a_device(args[1:], kwargs)):
            raise HostTraffic(f"a tensor is read: {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Operators, however they are called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        counted = (
            name == "aten::repeat_interleave" and isinstance(args[-1], torch.Tensor) and not kwargs.get("output_size")
        )
        if name in WAITS or counted or (name.startswith("aten::index") and _has_mask(args)):
            raise HostTraffic(f"an operator waits for the device: {name}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _patched(of: type = torch.Tensor, **methods) -> Iterator[None]:
    """A class with checks before some of its methods; each check is given the object, the name and the caller's file."""
    usual = {name: getattr(of, name) for name in methods}

    def make(name, check):
        def method(self, *args, **kwargs):
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename == __file__:  # torch calls again through a mode
                frame = frame.f_back
            check(self, name, frame.f_code.co_filename)
            return usual[name](self, *args, **kwargs)

        return method

    for name, check in methods.items():
        setattr(of, name, make(name, check))
    try:
        yield
    finally:
        for name, method in usual.items():
            setattr(of, name, method)


def _refuse(tensor, name, file) -> None:
    raise HostTraffic(f"a tensor is read: {name}")


def _refuse_waiting(device, name, file) -> None:
    raise HostTraffic(f"the device is waited for: {name}")


def _refuse_outside_kernels(tensor, name, file) -> None:
    if not Path(file).is_relative_to(KERNELS):
        raise HostTraffic(f"{name} is for the wrappers in kernels/, not for {file}")


@contextlib.contextmanager
def no_host_traffic() -> Iterator[None]:
    """Raises HostTraffic for code that makes a tensor of host values, reads one, or takes its address outside `kernels/`."""
    reads = dict.fromkeys(("tolist", "numpy", "item"), _refuse)
    with contextlib.ExitStack() as held:
        held.enter_context(_patched(**reads, data_ptr=_refuse_outside_kernels))
        held.enter_context(_patched(torch.UntypedStorage, data_ptr=_refuse_outside_kernels))
        held.enter_context(_patched(torch.cuda, synchronize=_refuse_waiting))
        held.enter_context(_Functions())
        held.enter_context(_Operators())
        yield


@contextlib.contextmanager
def counted_transfers() -> Iterator[list[str]]:
    """The reads of tensors while some code runs, by method; not those of page tables, which the host has anyway."""
    seen: list[str] = []

    def count(tensor, name, file) -> None:
        if not Path(file).is_relative_to(CORE / "attention") and Path(file) != CORE / "engine/batcher.py":
            seen.append(name)

    def count_numpy(tensor, name, file) -> None:
        # `cpu().numpy()` is one transfer: what is on the host already costs nothing to look at.
        if Path(file) not in (CORE / "engine/transfer.py", CORE / "engine/batcher.py"):
            seen.append(name)

    def count_copy(tensor, name, file) -> None:
        # Elsewhere `to` brings numbers to the device, which this does not count.
        if Path(file) == CORE / "engine/transfer.py":
            seen.append("copy")

    counts = dict.fromkeys((name for name in READS if name not in ("numpy", "__array__")), count)
    with _patched(**counts, numpy=count_numpy, to=count_copy):
        yield seen
