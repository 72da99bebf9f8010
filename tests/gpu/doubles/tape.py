"""The face of a CUDA graph on a CPU.

`Tape` runs what is captured and keeps every operator with the very tensors that it saw. A replay runs no Python of the step:
it runs those operators again on those tensors, each result into the memory that it had, as kernels with frozen addresses do.
So what a step took from Python (numbers, lists, branches) stays as it was, and what was not copied into memory of the capture
is stale. What a GPU could not capture is refused; the memory of the capture is filled with NaN before each replay.

It does not see streams, events, memory shared between graphs, nor calls of other threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu.doubles.launch import ACTIVE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lorax_core.engine.graphs import Graph

aten = torch.ops.aten
READS = "reads a value back"
REFUSED = {
    aten._local_scalar_dense.default: READS,
    aten.is_nonzero.default: READS,
    aten.equal.default: READS,
    aten.nonzero.default: "has a size that depends on values",
    aten.masked_select.default: "has a size that depends on values",
    aten._unique2.default: "has a size that depends on values",
    aten.lift_fresh.default: "makes a tensor of values of the host",
}
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_FAR = 1 << 28  # outside every table, and four of them in an int32


class CannotCapture(RuntimeError):
    """What a stream that is being captured refuses."""


class Tape(Graph):
    """A captured step. `temporary` tensors are given back to the allocator after the capture, so that replays find rubbish."""

    def __init__(self, temporary: Iterable[Tensor] = ()) -> None:
        self.temporary = list(temporary)
        self.launches: list[str] = []
        self.replays = 0
        self._steps: list[Callable[[], None]] = []
        self._pool: list[Tensor] = []

    def capture(self, compute: Callable[[], None]) -> None:
        compute()
        ACTIVE.recorder = self
        try:
            with _Recording(self):
                compute()
        finally:
            ACTIVE.recorder = None

    def replay(self) -> None:
        self.replays += 1
        for tensor in (*self._pool, *self.temporary):
            poison(tensor)
        for step in self._steps:
            step()

    def call(self, name: str, run: Callable[[], None]) -> None:
        """A kernel that is no operator of torch: run now, and at every replay."""
        self.launches.append(name)
        self._steps.append(run)
        with _disable_current_modes():
            run()

    def keep(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, and keep it where it does something to memory."""
        known = {_memory(tensor) for tensor in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        results = tensors(out)
        if func._schema.is_mutable:
            self._add(func, lambda: func(*args, **kwargs))
        elif any(_memory(tensor) not in known for tensor in results):
            self._pool += results

            def again() -> None:
                for mine, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                    mine.copy_(new)

            self._add(func, again)
        return out  # a view is the same memory at every replay

    def _add(self, func: Any, step: Callable[[], Any]) -> None:
        self.launches.append(str(func))
        self._steps.append(step)


class _Recording(TorchDispatchMode):
    """Shows a tape every operator of a capture."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED:
            raise CannotCapture(f"{func} {REFUSED[func]}")
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func in INDEXING:  # in itself fine; a mask has as many rows as it has True
            depends = {index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)}
        if depends:
            raise CannotCapture(f"{func} has a size that depends on values")
        return self._tape.keep(func, args, kwargs or {})


def poison(tensor: Tensor) -> None:
    """Fill memory with what shows wherever it is read."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(min(_FAR, torch.iinfo(tensor.dtype).max))


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in any nesting."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int | None:
    # Weights that oneDNN packed have no storage of torch's; no operator gives a view of them.
    return None if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
