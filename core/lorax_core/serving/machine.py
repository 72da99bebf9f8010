"""What of the machine an engine uses: its device, the dtype that it computes in, and threads.

Decides by the words of `EngineOptions` and by what the machine has. Knows nothing of models.
"""

from __future__ import annotations

import os
import threading

import torch

from lorax_core.errors import RequestError
from lorax_core.linear_methods.select import fast_in_bfloat16
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import stored_dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# torch has one pool of threads for the process, so two engines cannot have different numbers.
_threads_lock = threading.Lock()
_threads: int | None = None
_THREADS_A_CORE = 8  # far beyond what is of use


def find_device(device: str) -> str:
    """The device that a word means; raises RequestError for one that is none, or that torch does not see."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise RequestError(f"{device!r} is not a device: {error}", hint="use 'cpu', 'cuda' or 'auto'") from error
    if kind not in ("cpu", "cuda"):
        raise RequestError(f"device {device!r} is not supported", hint="use 'cpu', 'cuda' or 'auto'")
    if torch.device(device).index not in (None, 0):
        raise RequestError(
            f"device {device!r}: an engine uses the first GPU that is visible",
            hint=f"set CUDA_VISIBLE_DEVICES={torch.device(device).index} and use device='cuda'",
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {device!r} was asked for, but torch sees no GPU", hint="use device='cpu'")
    return device


def choose_dtype(name: str, files: Checkpoint, device: str, half: torch.dtype | None) -> torch.dtype:
    """What a checkpoint is computed in on a device, by the word of `EngineOptions.dtype`.

    `half` is the dtype of 16 bit that a GPU computes in, see `sixteen_bit`.
    """
    if name != "auto":
        return _DTYPES[name]
    stored = stored_dtype(files)
    if half is not None:
        # Kernels for GPUs compute in 16 bit; a GPU without bfloat16 would emulate it.
        return half if stored is torch.float32 or half is torch.float16 else stored
    # A CPU without instructions for 16 bit converts on the way, which is slower than float32 throughout.
    if stored is torch.float32 or torch.device(device).type != "cpu":
        return stored
    return stored if stored is torch.bfloat16 and fast_in_bfloat16(device) else torch.float32


def set_threads(threads: int | None) -> None:
    """Compute with so many threads, in the whole process; raises RequestError for a number that cannot be."""
    global _threads
    if threads is None:
        return
    cores = os.cpu_count() or 1
    # The system refuses to start a million threads by ending the process.
    if threads > cores * _THREADS_A_CORE:
        raise RequestError(
            f"threads={threads} was asked for, but this machine has {cores} cores: {cores * _THREADS_A_CORE} are the most",
            hint=f"load with threads={cores}, or leave threads out",
        )
    with _threads_lock:
        # Refused and not changed: the engine that runs would silently become slower, or disturb others.
        if _threads is not None and _threads != threads:
            raise RequestError(
                f"threads={threads} was asked for, but this process computes with {_threads}: the number is one for the "
                "process",
                hint=f"leave threads out, or load with threads={_threads}",
            )
        torch.set_num_threads(threads)
        _threads = threads
