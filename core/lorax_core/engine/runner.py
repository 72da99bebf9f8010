"""One step on the device: batch in, answers out.

Decides how a plan is computed and read back. Knows nothing of stopping, text or who waits for the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.attention.base import AttentionBackend
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.sampler import Draw, sample
from lorax_core.engine.scheduler import Chunk, StepPlan
from lorax_core.engine.sequence import Sequence
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.heads import EmbeddingHead
from lorax_core.modeling.model import Model
from lorax_core.types import Task


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step gave one sequence: its next token, or its finished vector."""

    token_id: int | None = None
    vector: NDArray[np.float32] | None = None


class Runner:
    """Runs plans over one model with one attention backend."""

    def __init__(self, model: Model, backend: AttentionBackend, pool: KVPool | None) -> None:
        self._model = model
        self._backend = backend
        self._batcher = Batcher(model, pool)
        self._specs = model.attention_specs

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[Sequence, Answer]:
        """Compute a plan; an answer for each sequence that got one (a chunk in the middle of a prompt gets none)."""
        packed = self._batcher.pack(plan)
        packed.batch.attention = self._backend
        self._backend.plan(packed.batch, self._specs)
        output = self._model(packed.batch)
        answers: dict[Sequence, Answer] = {}
        for group, rows in zip(packed.batch.head_rows, output.answers, strict=True):
            chunks = [packed.chunks[index] for index in group.sequences]
            if group.task is Task.GENERATE:
                answers |= self._tokens(chunks, rows)
            else:
                self._pool(chunks, rows)
        answers |= self._vectors(
            [chunk for chunk in packed.chunks if chunk.final and chunk.sequence.task is Task.EMBED]
        )
        return answers

    def _tokens(self, chunks: list[Chunk], logits: Tensor) -> dict[Sequence, Answer]:
        """logits `[sequences, vocab]` to a token for each."""
        tokens = sample(logits, [Draw(chunk.sequence.sampling, len(chunk.sequence)) for chunk in chunks])
        return {chunk.sequence: Answer(token_id=token) for chunk, token in zip(chunks, tokens, strict=True)}

    def _pool(self, chunks: list[Chunk], sums: Tensor) -> None:
        """Add this step's sums `[sequences, hidden]` to what earlier chunks of the same texts gave."""
        for chunk, row in zip(chunks, sums, strict=True):
            sequence = chunk.sequence
            sequence.pooled = row if sequence.pooled is None else sequence.pooled + row

    def _vectors(self, chunks: list[Chunk]) -> dict[Sequence, Answer]:
        if not chunks:
            return {}
        head = cast("EmbeddingHead", self._model.head(Task.EMBED))
        counts = [head.pooled_rows(len(chunk.sequence), chunk.sequence.pool_from) for chunk in chunks]
        sums = torch.stack([chunk.sequence.pooled for chunk in chunks])  # [texts, hidden]
        vectors = head.finish(sums, torch.tensor(counts, device=sums.device)).cpu().numpy()
        return {chunk.sequence: Answer(vector=vector.copy()) for chunk, vector in zip(chunks, vectors, strict=True)}
