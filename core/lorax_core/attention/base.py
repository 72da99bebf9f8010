"""What an attention backend is.

Decides the interface between layers, engine and kernels. Knows nothing of models or schedules. Backends only read the
cache; the pool writes it, so all of them share its bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorax_core.modeling.attention import Attention
    from lorax_core.modeling.batch import Batch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a backend must know of a layer.

    `window` counts the keys that a query sees, itself included; None is all. Scores are `q k^T head_dim^-0.5`, then
    `soft_cap * tanh(scores / soft_cap)` when a cap is given.
    """

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    soft_cap: float | None = None


class AttentionBackend(ABC):
    """One implementation of attention over packed batches.

    The engine calls `plan` once a step; layers then call `attend` (causal, over the paged cache) or `encode`
    (bidirectional, inside the batch). One backend object serves one engine.
    """

    name: ClassVar[str]
    page_multiple: ClassVar[int] = 1

    @classmethod
    @abstractmethod
    def is_available(cls) -> tuple[bool, str]:
        """Whether this process can use the backend, and why not. An import probe; nothing is compiled."""

    @abstractmethod
    def supports(self, spec: AttentionSpec, page_size: int, dtype: torch.dtype, device: str) -> str | None:
        """None when the backend computes such a layer, else the reason why not."""

    @abstractmethod
    def plan(self, batch: Batch, specs: Sequence[AttentionSpec]) -> None:
        """Prepare `batch.plan` for all layers of a step; `specs` are the distinct kinds of attention in the model."""

    @abstractmethod
    def attend(self, q: Tensor, layer: Attention, batch: Batch) -> Tensor:
        """Causal attention over the cache: q `[tokens, heads, dim]` to the same shape. K and V are already written."""

    @abstractmethod
    def encode(self, q: Tensor, k: Tensor, v: Tensor, layer: Attention, batch: Batch) -> Tensor:
        """Bidirectional attention inside each sequence: `[tokens, heads | kv_heads, dim]` to q's shape."""
