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

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lorax_core.attention.base import HostAndDevice, StepAttention
from lorax_core.kernels.elementwise import Angles
from lorax_core.modeling.site import AdapterRows, NoAdapters
from lorax_core.types import Task


class Speculator(Protocol):
    """What drafts tokens ahead of a language model's own."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""

    def draft(self, hidden: Tensor, base_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens `[rows, drafts]` after the one that follows each row of hidden `[rows, hidden]`; `base_logits` gives the
        base's logits of other hidden rows."""


class HeadModule(Protocol):
    """A head as the batch carries it: `modeling.heads.Head`, which itself reads `HeadRows`."""

    def __call__(self, hidden: Tensor, rows: HeadRows) -> Tensor: ...


class Rotary(Protocol):
    """A rotary position embedding; equal keys mean equal angles."""

    @property
    def key(self) -> Hashable: ...

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Positions `[tokens]` to their angles."""


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of hidden that one head turns into answers.

    `sequences` are positions in the batch, `counts` how many rows each of them gives, `rows` `[sum(counts)]` int64 the rows
    themselves in that order, and `adapters` acts on exactly those rows. Without a `task` the answer is hidden itself.
    `head` is one that an adapter has of its own; None is the model's for the task. With a `speculator` the rows themselves are
    part of the step's output, for it to read once the step's tokens are known. `pooled_adapters` makes what acts on one row for
    each sequence.
    """

    task: Task | None
    sequences: tuple[int, ...]
    counts: tuple[int, ...]
    rows: Tensor  # [sum(counts)] int64
    adapters: AdapterRows = field(default_factory=NoAdapters)
    head: HeadModule | None = None
    speculator: Speculator | None = None
    pooled_adapters: Callable[[], AdapterRows] = NoAdapters

    def pooled(self) -> HeadRows:
        """The same once a head has made one row of those of each sequence."""
        if all(count == 1 for count in self.counts):
            return self
        return replace(self, counts=(1,) * len(self.counts), adapters=self.pooled_adapters())


@dataclass(slots=True)
class Batch:
    """Packed tokens of several sequences, each at its own position, task and adapter."""

    # Filled by the batcher: what is computed.
    input_ids: Tensor  # [tokens] int64
    position_ids: Tensor  # [tokens] int64, from 0 in each sequence
    token_type_ids: Tensor  # [tokens] int64
    query_starts: HostAndDevice  # [seqs + 1] int32: first row of each sequence; last, the number of tokens
    kv_lengths: HostAndDevice  # [seqs] int32: tokens of each sequence up to the end of this step
    head_rows: tuple[HeadRows, ...] = ()
    adapters: AdapterRows = field(default_factory=NoAdapters)

    # Filled by the batcher for models with a cache: where the past lies and where the present goes.
    page_table: HostAndDevice | None = None  # [seqs, most pages] int32: pages of each sequence in order, then page 0
    slots: Tensor | None = None  # [tokens] int64: page * page_size + offset

    # Filled by the attention backend once a step.
    attention: StepAttention | None = None

    # Angles of this step's positions, made when a layer first asks and shared by the layers after it.
    _angles: dict[tuple[Hashable, torch.dtype], Angles] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence in this step, `[seqs]`, read from the host."""
        # The host copy: reading the device tensor would make the CPU wait for the GPU.
        starts: list[int] = self.query_starts.host.tolist()
        return tuple(stop - start for start, stop in pairwise(starts))

    def angles(self, rotary: Rotary, dtype: torch.dtype) -> Angles:
        """The angles of this step's positions, computed once for all layers of one rotary embedding."""
        # By value and not by object: each layer may have a RotaryEmbedding of its own. The dtype is part of the key
        # because angles are rounded to it.
        key = rotary.key, dtype
        found = self._angles.get(key)
        if found is None:
            found = self._angles[key] = rotary.angles(self.position_ids, dtype)  # cos, sin [tokens, 1, rotary_dim / 2]
        return found

    def start_pass(self) -> None:
        """A forward pass begins: nothing is kept of one before, whose positions may have been others."""
        # `model(batch)` may be called again after `position_ids` were replaced: old angles would rotate by old positions.
        self._angles.clear()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the rows of a batch asked for.

    `answers` runs parallel to `Batch.head_rows`: what the head of each group gave, one row for each of its rows or, from
    heads that pool, for each of its sequences; or the hidden rows, where no head was asked. `hidden` are the hidden rows of
    groups with a speculator, None for the others.
    """

    answers: tuple[Tensor, ...]
    hidden: tuple[Tensor | None, ...] = ()
