"""What the doubles of compiled code share: how they refuse, and how a captured graph keeps a launch.

A double computes on the CPU what a kernel does on a GPU, from the same arguments. It raises `Misuse` for what the kernel
would read as rubbish, in silence or with a fault of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Misuse(AssertionError):
    """A call that compiled code would take, and answer with rubbish or a crash."""


class Recorder(Protocol):
    """What captures launches, as a CUDA graph does."""

    def call(self, name: str, run: Callable[[], None]) -> None:
        """Run a launch now, and again at every replay."""


class _Active:
    """The capture that is going on in this process."""

    recorder: Recorder | None = None


ACTIVE = _Active()


def launch(name: str, run: Callable[[], None]) -> None:
    """Run what a kernel does; a capture that is going on keeps it for its replays."""
    if ACTIVE.recorder is None:
        run()
    else:
        ACTIVE.recorder.call(name, run)


def insist(holds: object, what: str) -> None:
    """Raise Misuse unless something holds."""
    if not holds:
        raise Misuse(what)


def insist_int32(**tensors: torch.Tensor | None) -> None:
    """Raise Misuse where one of these is there and is not int32, in one piece."""
    for name, tensor in tensors.items():
        if tensor is not None:
            insist(tensor.dtype is torch.int32, f"{name} is {tensor.dtype}; the kernels read int32")
            insist(tensor.stride(-1) == 1, f"{name} has gaps in its last dimension")


def insist_version(package: str, found: str, pinned: str) -> None:
    """Raise Misuse when the installed version is not the one that a double was written for."""
    insist(found == pinned, f"{package} is {found}, and its double knows {pinned}: compare them, then change the pin")
