"""What a GPU does not tell and the interpreter lets us see: `watched(*tensors)`.

Inside, a kernel that reads or writes outside the memory of these tensors raises `OutOfBounds`, and one of whose programs
touches what another writes raises `Race`: on a GPU they run in any order, or at once. One that states a divisor which a
number or address does not have raises `NotDivisible`: compiled, its wide loads would fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

MANY = ("several programs",)


class OutOfBounds(AssertionError):
    """A kernel touched memory that is no tensor's."""


class Race(AssertionError):
    """Programs of one launch touched one address, and one of them wrote it."""


class NotDivisible(AssertionError):
    """A kernel called `tl.multiple_of` for what is no such multiple."""


class _Watch:
    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors: list[Tensor] = []
        self.admit(*tensors)
        self.writers: dict[int, tuple] = {}
        self.readers: dict[int, tuple] = {}

    def admit(self, *tensors: Tensor) -> None:
        self.tensors += tensors  # held, so that their memory is not given to others
        spans = sorted((t.data_ptr(), _end(t)) for t in self.tensors)
        self.starts, self.ends = (np.array(side, np.uint64) for side in zip(*spans, strict=True))

    def start(self) -> None:
        self.writers.clear()
        self.readers.clear()

    def check(self, pointers, mask, kind: str) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        kept = np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)
        at = np.asarray(pointers.data).ravel()[kept].astype(np.uint64)
        program = tuple(interpreter.interpreter_builder.grid_idx)
        where = np.searchsorted(self.starts, at, side="right").astype(int) - 1
        outside = (where < 0) | (at + np.uint64(size) > self.ends[np.maximum(where, 0)])
        if outside.any():
            raise OutOfBounds(f"program {program}: a {kind} of {int(outside.sum())} numbers outside every tensor")
        for address in at.tolist():
            self._note(address, program, kind)

    def _note(self, address: int, program: tuple, kind: str) -> None:
        writer = self.writers.get(address, program)
        if writer != program:
            raise Race(f"a {kind} of program {program} where program {writer} writes")
        if kind == "write":
            reader = self.readers.get(address, program)
            if reader != program:
                raise Race(f"a write of program {program} where {reader} read")
            self.writers[address] = program
        elif self.readers.setdefault(address, program) != program:
            self.readers[address] = MANY


def _end(tensor: Tensor) -> int:
    # The tensor's own numbers and not its storage's: a view's neighbours are others' memory.
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size() if tensor.numel() else tensor.data_ptr()


class _Allocations(TorchDispatchMode):
    """What is allocated for results is admitted, and full of NaN: a number that was never written shows."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        # The interpreter itself makes some, of no numbers.
        if function is torch.ops.aten.new_empty.default and made.numel() and made.is_floating_point():
            self.watch.admit(made.fill_(float("nan")))
        return made


@contextlib.contextmanager
def watched(*tensors: Tensor) -> Iterator[None]:
    """Kernels may touch these tensors alone, and what is allocated meanwhile; name those too that tables point to."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    handle, set_attr = interpreter.TensorHandle, interpreter.TensorHandle.set_attr
    watch = _Watch(tensors)

    def watched_load(self, pointers, mask, *rest):
        watch.check(pointers, mask, "read")
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watch.check(pointers, mask, "write")
        return store(self, pointers, value, mask, *rest)

    def watched_launch(self, *args, **kwargs):
        watch.start()
        return launch(self, *args, **kwargs)

    def watched_attr(self, key, values):
        if key == "tt.divisibility" and int(first := self.data.ravel()[0]) % values[-1]:
            raise NotDivisible(f"{first} is no multiple of {values[-1]}")
        set_attr(self, key, values)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    handle.set_attr = watched_attr
    executor.__call__ = watched_launch
    try:
        with _Allocations(watch):
            yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__, handle.set_attr = launch, set_attr
