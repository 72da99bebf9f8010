"""The cache over which kernels are tried.

Decides what lies where: pages in no order, and in each layer other numbers and other scales, so that a kernel that reads
another page or another layer gives wrong numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from lorax_core.kvcache.pool import KVPool
from lorax_core.serving.trial.spec import AttentionTrial, GraphTrial, LayerKind

# Of an 8-bit cache: a scale that is forgotten, is the other's, or is another layer's shows.
_K_SCALE, _V_SCALE, _FROM_LAYER_TO_LAYER = 0.5, 0.25, 0.7


def tried_layers(trial: AttentionTrial | GraphTrial) -> list[LayerKind]:
    """The layers that are computed: one of each kind, and a second of the first, with other numbers and scales."""
    return [*trial.layers, trial.layers[0]]


def strewn(counts: Sequence[int]) -> list[list[int]]:
    """So many pages for each sequence, from 1 on, in no order."""
    pages = random.Random(1).sample(range(1, sum(counts) + 1), sum(counts))
    return [[pages.pop() for _ in range(count)] for count in counts]


def filled_pool(trial: AttentionTrial | GraphTrial, pages: int, dtype: torch.dtype, first: int = 0) -> KVPool:
    """A cache of the layers that are tried, with the same numbers in every `dtype`; those before `first` hold nothing."""
    kind, layers = trial.layers[0], len(tried_layers(trial))
    pool = KVPool(
        layers=layers,
        pages=pages,
        page_size=trial.page_size,
        kv_heads=kind.kv_heads,
        head_dim=kind.head_dim,
        dtype=dtype,
        device=trial.device,
        scales=[
            (_K_SCALE * shrunk, _V_SCALE * shrunk)
            for shrunk in (_FROM_LAYER_TO_LAYER**layer for layer in range(layers))
        ],
    )
    slots = torch.arange(trial.page_size, pages * trial.page_size)
    generator = torch.Generator().manual_seed(1)
    for layer in range(first, layers):
        # Rounded to the trial's dtype first, so that a cache of another holds the same numbers.
        k, v = (
            torch.randn(len(slots), kind.kv_heads, kind.head_dim, generator=generator).to(trial.torch_dtype)
            for _ in "kv"
        )
        pool.write(layer, *(one.to(trial.device) for one in (k, v, slots)))
    return pool
