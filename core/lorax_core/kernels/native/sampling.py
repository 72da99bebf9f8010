"""The compiled sampling of rows of logits.

Decides how tensors and settings become the arguments of `sampling.cpp`: the only module that hands their addresses to it. Knows
nothing of requests; what a setting means is said where the readable form is, in `engine.sampler`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.kernels.native.build import load_native
from lorax_core.settings import Settings

SOURCE = Path(__file__).with_name("sampling.cpp")
# In the order of `struct Settings`, so the array is handed over as it is.
_SETTINGS = np.dtype(
    [(name, np.float64) for name in ("temperature", "point", "top_p", "min_p", "typical_p")] + [("top_k", np.int64)]
)
_SCRATCH = 48  # bytes for each token that a thread has for itself
_FEW = 1 << 15  # numbers of logits, below which a second thread costs more than it saves

RowSettings = tuple[float, float, float, float, float, int]
"""Temperature (0 is greedy), the number in [0, 1) that is drawn, top_p, min_p, typical_p, top_k (0 is all)."""


class NativeSampling:
    """Tokens, scores and masks of float32 logits `[rows, vocab]` on the CPU; each row by itself, in one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._sample, self._score, self._mask = library.sample, library.score, library.mask
        self._sample.argtypes = [*(address, number) * 2, number, number, *(address,) * 5, threads]
        self._score.argtypes = [address, *(number,) * 4, *(address,) * 5, threads]
        self._mask.argtypes = [address, number, number, address, address, number, number, threads]
        for function in (self._sample, self._score, self._mask):
            function.restype = None

    def sample(self, logits: Tensor, raw: Tensor, settings: Sequence[RowSettings]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[rows]` of `logits`, whether the model gave numbers (`raw`), and whether any token is left.

        A row that fails either has token 0.
        """
        same = raw is logits
        logits = _rows(logits)
        raw = logits if same else _rows(raw)
        rows, vocab = logits.shape
        tokens, sound, left = torch.empty(rows, dtype=torch.int64), *torch.empty((2, rows), dtype=torch.bool)
        by = np.array(settings, _SETTINGS)
        scratch, threads = self._scratch(rows, vocab)
        self._sample(
            *(logits.data_ptr(), logits.stride(0), raw.data_ptr(), raw.stride(0), rows, vocab, by.ctypes.data),
            *(tokens.data_ptr(), sound.data_ptr(), left.data_ptr(), scratch.data_ptr(), threads),
        )
        return tokens, sound, left

    def score(self, logits: Tensor, chosen: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities: of the chosen tokens `[rows]`; of the most likely `[rows, count]`, with their ids."""
        logits = _rows(logits)
        rows, vocab = logits.shape
        ids, values = torch.empty((rows, count), dtype=torch.int64), torch.empty((rows, count))
        best, mass = torch.empty(rows), torch.empty(rows, dtype=torch.float64)
        scratch, threads = self._scratch(rows, vocab)
        self._score(
            *(logits.data_ptr(), logits.stride(0), rows, vocab, count, ids.data_ptr(), values.data_ptr()),
            *(best.data_ptr(), mass.data_ptr(), scratch.data_ptr(), threads),
        )
        # The largest first: beside a large logit the logarithm would be lost.
        largest, rest = best.double()[:, None], mass.log()[:, None]  # [rows, 1]
        own = logits.gather(-1, chosen[:, None]) - largest - rest
        return own[:, 0].float(), (values - largest - rest).float(), ids

    def mask(self, logits: Tensor, rows: Sequence[int], allowed: NDArray[np.uint8]) -> None:
        """Put -inf into some rows where their bit in `allowed` `[len(rows), bytes]` is not set, the lowest first."""
        assert logits.stride(-1) == 1, "masked in place"
        at = np.array(rows, np.int64)
        self._mask(
            *(logits.data_ptr(), logits.stride(0), logits.shape[1], at.ctypes.data),
            *(allowed.ctypes.data, allowed.shape[1], len(at), _threads(len(at), logits.shape[1])),
        )

    @staticmethod
    def _scratch(rows: int, vocab: int) -> tuple[Tensor, int]:
        threads = _threads(rows, vocab)
        # Of the memory of rows without filters nearly nothing is touched, nor is it there then.
        return torch.empty(threads * vocab * _SCRATCH, dtype=torch.uint8), threads


def _threads(rows: int, vocab: int) -> int:
    return min(torch.get_num_threads(), rows) if rows * vocab > _FEW else 1


def _rows(logits: Tensor) -> Tensor:
    # Rows may lie apart, but the numbers of one must be neighbours.
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@functools.cache
def load_sampling(settings: Settings) -> tuple[NativeSampling | None, str]:
    """The compiled sampling and where it lies; or None, and why there is none."""
    native = load_native(SOURCE, settings)
    if native.library is None:
        return None, native.reason
    try:
        return NativeSampling(native.library), native.reason
    except AttributeError as error:
        return None, str(error)
