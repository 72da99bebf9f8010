"""The one argument of a forward pass.

Decides what a step's tensors are called and who fills them. Knows nothing of requests, schedules or files: the batcher
makes a `Batch`, layers read it, and nothing is global, so two engines live in one process.

Shapes used throughout the project:

    tokens      rows of the packed batch: the new tokens of all its sequences, end to end, without padding
    seqs        sequences in the batch
    heads       query heads;  kv_heads: key and value heads;  dim: size of one head
    hidden      width of the model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lorax_core.types import Task

if TYPE_CHECKING:
    from lorax_core.attention.base import AttentionBackend
    from lorax_core.modeling.heads import Head
    from lorax_core.modeling.site import Site


class KVCache(Protocol):
    """What attention layers and backends ask of the cache. A slot is `page * page_size + offset`."""

    page_size: int

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store k and v `[tokens, kv_heads, dim]` of one layer at `slots` `[tokens]`."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer as they are stored, each `[pages, page, kv_heads, dim]`, to read."""

    def gather(self, layer: int, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of some pages, to compute with: each `[*pages.shape, page, kv_heads, dim]`."""


class AdapterRows(Protocol):
    """What a layer with parameters asks of the adapters of a set of rows."""

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y `[rows, out]` of the base layer for x `[rows, in]`, with each row's adapter added (y may be changed in place)."""


class Speculator(Protocol):
    """What drafts the tokens after a language model's next one."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""

    def draft(self, hidden: Tensor, base_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens `[rows, draft tokens]` after the one that follows each row of hidden `[rows, hidden]`; `base_logits` gives
        the base's logits of other hidden rows."""


class NoAdapters:
    """Every row is the base model's: sites pay one call and nothing else."""

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        return y


class HasAdapters(Protocol):
    """Rows that adapters may change: a whole `Batch`, or the `HeadRows` of one head."""

    @property
    def adapters(self) -> AdapterRows: ...


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of hidden that one head turns into answers.

    `sequences` are positions in the batch, `counts` how many rows each of them gives, `rows` `[sum(counts)]` int64 the rows
    themselves in that order, and `adapters` acts on exactly those rows. Without a `task` the answer is hidden itself.
    `head` is one that an adapter brought; None is the model's own for the task. With a `speculator` the rows themselves are
    part of the step's output, for it to read once the step's tokens are known.
    """

    task: Task | None
    sequences: tuple[int, ...]
    counts: tuple[int, ...]
    rows: Tensor
    adapters: AdapterRows = field(default_factory=NoAdapters)
    head: Head | None = None
    speculator: Speculator | None = None


@dataclass(slots=True)
class Batch:
    """Packed tokens of several sequences, each at its own position, task and adapter."""

    # Filled by the batcher: what is computed.
    input_ids: Tensor  # [tokens] int64
    position_ids: Tensor  # [tokens] int64, from 0 in each sequence
    token_type_ids: Tensor  # [tokens] int64
    lengths: tuple[int, ...]  # [seqs] rows of each sequence in this step
    head_rows: tuple[HeadRows, ...]

    # Filled by the batcher for models with a cache: where the past lies and where the present goes.
    cached: tuple[int, ...] = ()  # [seqs] tokens of each sequence in the cache before this step
    pages: tuple[tuple[int, ...], ...] = ()  # [seqs][...] pages of each sequence, in order
    slots: Tensor | None = None  # [tokens] int64: page * page_size + offset

    # Services of the engine.
    attention: AttentionBackend | None = None
    kv: KVCache | None = None
    adapters: AdapterRows = field(default_factory=NoAdapters)

    # Filled by the attention backend once a step.
    plan: Any = None

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each sequence and, last, the number of tokens: `[seqs + 1]`."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the rows of a batch asked for.

    `answers` runs parallel to `Batch.head_rows`: what the head of each group gave, one row for each of its rows or, from
    heads that pool, for each of its sequences; or the hidden rows, where no head was asked. `read` are the hidden rows of
    groups with a speculator, None for the others.
    """

    answers: tuple[Tensor, ...]
    read: tuple[Tensor | None, ...] = ()
