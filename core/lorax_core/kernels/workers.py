"""The OpenMP workers of threads that have no more to compute.

Decides which runtime is asked to end them, and that a thread has none when it forks. GNU's OpenMP gives each thread that
computes workers of its own. As soon as all together are more than the processors, none spins between two parallel loops: each
loop then waits for the system to wake them, which takes longer than a small product, and a step of decoding has some 150 such
loops. Knows nothing of engines.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_HARD = 2  # omp_pause_hard


def end_workers() -> bool:
    """End the workers of the calling thread, so that those of other threads spin; False where there is nothing to ask.

    Its next parallel loop gets new ones. In a parallel loop nothing happens.
    """
    pause = _pause()
    return pause is not None and pause(_HARD) == 0


# A child that was forked while its thread had workers would wait for them in its first loop, for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=end_workers)


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """GNU's `omp_pause_resource_all`, of the library that this process has loaded; others do not need it."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    # Wheels bring their own under a name of theirs; a distribution's torch takes the system's.
    found = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    for name in (*map(str, sorted(found)), "libgomp.so.1"):
        try:
            function = ctypes.CDLL(name, mode=os.RTLD_NOLOAD).omp_pause_resource_all
        except (OSError, AttributeError):  # not loaded, or older than OpenMP 5
            continue
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_int
        pause: Callable[[int], int] = function
        return pause
    return None
