"""The GPU of this process: what it is, and work that it does at the same time.

Decides in which order two branches of work are launched. Asks torch in one place, so that tests can put another GPU there.
Knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def compute_capability(device: str) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None for any other device, and where torch sees no GPU."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


class Branch:
    """A second stream, for work that the GPU may do beside that of the current one. Also within a capture.

    `cuda` is `torch.cuda`, or what stands for it where no GPU is.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched in this block comes after all that was launched so far, and beside what follows."""
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from here on comes after the branch's work."""
        self._cuda.current_stream(self._device).wait_stream(self._stream)
