"""One step on the device: batch in, answers out.

Decides how a plan is computed and read back. Knows nothing of stopping, text or who waits for the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from lorax_core.modeling.heads import Head
from lorax_core.modeling.model import Model
from lorax_core.types import Task


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step gave one sequence: its next token, or what the head made of its whole text."""

    token_id: int | None = None
    values: NDArray[np.float32] | None = None


class Runner:
    """Runs plans over one model with one attention backend."""

    def __init__(self, model: Model, backend: AttentionBackend, pool: KVPool | None) -> None:
        self._model = model
        self._backend = backend
        self._batcher = Batcher(model, pool)
        self._specs = model.attention_specs

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[Sequence, Answer]:
        """Compute a plan; an answer for each sequence that got one (a chunk in the middle of a text gets none)."""
        packed = self._batcher.pack(plan)
        packed.batch.attention = self._backend
        self._backend.plan(packed.batch, self._specs)
        output = self._model(packed.batch)
        answers: dict[Sequence, Answer] = {}
        for group, rows in zip(packed.batch.head_rows, output.answers, strict=True):
            chunks = [packed.chunks[index] for index in group.sequences]
            if group.task is Task.GENERATE:
                answers |= self._tokens(chunks, rows)
            elif group.task is not None:
                self._join(self._model.head(group.task), chunks, rows, group.counts)
        answers |= self._finished(
            [c.sequence for c in packed.chunks if c.final and c.sequence.task is not Task.GENERATE]
        )
        return answers

    def _tokens(self, chunks: list[Chunk], logits: Tensor) -> dict[Sequence, Answer]:
        """logits `[sequences, vocab]` to a token for each."""
        tokens = sample(logits, [Draw(chunk.sequence.sampling, len(chunk.sequence)) for chunk in chunks])
        return {chunk.sequence: Answer(token_id=token) for chunk, token in zip(chunks, tokens, strict=True)}

    def _join(self, head: Head, chunks: list[Chunk], answers: Tensor, counts: tuple[int, ...]) -> None:
        """Add a step's answers to what earlier chunks of the same texts gave."""
        parts = answers.unbind(0) if head.pooled else torch.split(answers, list(counts))
        for chunk, part in zip(chunks, parts, strict=True):
            before = chunk.sequence.part
            if before is not None:
                part = before + part if head.pooled else torch.cat((before, part))
            chunk.sequence.part = part

    def _finished(self, sequences: list[Sequence]) -> dict[Sequence, Answer]:
        """Whole texts to their answers, task by task."""
        answers: dict[Sequence, Answer] = {}
        for task in dict.fromkeys(sequence.task for sequence in sequences):
            group = [sequence for sequence in sequences if sequence.task is task]
            counts = [len(sequence.span) if sequence.span is not None else 0 for sequence in group]
            made = self._model.head(task).finish([sequence.part for sequence in group], counts)
            for sequence, values in zip(group, made, strict=True):
                answers[sequence] = Answer(values=values.float().cpu().numpy().copy())
        return answers
