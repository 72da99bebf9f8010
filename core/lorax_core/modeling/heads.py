"""Heads: what turns rows of hidden into a task's answer.

Decides which rows a task needs and the arithmetic after the backbone. Knows nothing of sampling, of texts or of how rows
got into the batch. Several heads share one backbone.
"""

from __future__ import annotations

from collections.abc import Set
from enum import Enum
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_core.modeling.batch import HeadRows
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.linear import Linear
from lorax_core.types import Pooling, Task


class Rows(Enum):
    """Which rows of a sequence a head reads."""

    FIRST = "first"
    LAST = "last"
    ALL = "all"


class Head(nn.Module):
    """Base of all heads.

    `build` makes the head when the checkpoint has its weights, and None otherwise. Parameter names are those of the
    checkpoint (`lm_head.weight`), for the loader fills heads and backbone from one table.
    """

    task: ClassVar[Task]

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str]) -> Self | None:
        """`names` are the tensors of the checkpoint under their canonical names."""
        raise NotImplementedError

    @property
    def rows(self) -> Rows:
        raise NotImplementedError

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        """hidden `[sum(rows.counts), hidden]`, already selected, to the answers."""
        raise NotImplementedError


class LanguageModelHead(Head):
    """Logits over the vocabulary, in float32."""

    task = Task.GENERATE

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str]) -> Self | None:
        has_weight = config.tie_word_embeddings or "lm_head.weight" in names
        return cls(config) if has_weight else None

    @property
    def rows(self) -> Rows:
        return Rows.LAST

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        logits: Tensor = self.lm_head(hidden, rows)  # [rows, vocab]
        return logits.float()


class EmbeddingHead(Head):
    """One vector for a text: pooled rows, then optionally scaled to unit length.

    A long text of a causal model arrives in chunks, so `forward` gives float32 sums, which add up over chunks, and
    `finish` makes vectors of them once the text is complete.
    """

    task = Task.EMBED

    def __init__(self, hidden_size: int, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        self.dim = hidden_size
        self.pooling = pooling
        self.normalize = normalize

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str]) -> Self | None:  # noqa: ARG003
        return cls(config.hidden_size, Pooling.CLS, normalize=False)

    @property
    def rows(self) -> Rows:
        return {Pooling.CLS: Rows.FIRST, Pooling.LAST: Rows.LAST, Pooling.MEAN: Rows.ALL}[self.pooling]

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        sums = [part.sum(0, dtype=torch.float32) for part in torch.split(hidden, list(rows.counts))]
        return torch.stack(sums)  # [sequences, hidden]

    def pooled_rows(self, length: int, pool_from: int) -> int:
        """How many rows of a text of `length` tokens, counted from `pool_from`, are in its sum."""
        return length - pool_from if self.pooling is Pooling.MEAN else 1

    def finish(self, sums: Tensor, counts: Tensor) -> Tensor:
        """sums `[texts, hidden]` over `counts` `[texts]` rows to vectors `[texts, dim]` in float32."""
        vectors = sums / counts[:, None]
        return F.normalize(vectors, dim=-1) if self.normalize else vectors
