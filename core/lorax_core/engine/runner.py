"""One step on the device: plain data in, answers out.

Decides how a step is computed and read back: everything is launched first, then one transfer brings the answers. A launch
that fails leaves nothing behind, so a step can be tried again in smaller pieces. Knows nothing of stopping, text or who waits
for the answers.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.adapters.base import Bound
from lorax_core.adapters.lora_kernels.base import LoraKernel
from lorax_core.attention.base import AttentionBackend
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.graphs import OFF, REPLAYED, DecodeGraphs, why_eager
from lorax_core.engine.sampler import Sampled, SampledToken, Scores, select_native
from lorax_core.engine.sequence import Sampling, Stage
from lorax_core.engine.step_input import ChunkInput, HeadRead, SamplingRow, StepInput
from lorax_core.engine.transfer import Transfer
from lorax_core.kernels.native.sampling import NativeSampling
from lorax_core.kvcache.allocator import SCRATCH_PAGE
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import HeadRows
from lorax_core.modeling.heads import Head
from lorax_core.modeling.model import Model
from lorax_core.types import Task, TokenLogprobs


@dataclass(slots=True)  # not frozen: that takes five times as long, at each row
class Answer:
    """What a step gave one sequence.

    `sampled`: a token for the newest row and each right draft token before it, in order. `prompt_scores`: of the prompt tokens
    that this chunk's rows predict. `drafts`: the adapter's, for the tokens after the last of `sampled`. `values`: what the head
    computed from the whole input, once it is complete.
    """

    sampled: tuple[SampledToken, ...] = ()
    prompt_scores: tuple[TokenLogprobs, ...] = ()
    drafts: tuple[int, ...] = ()
    values: NDArray[np.float32] | None = None


class Runner:
    """Runs steps over one model with one attention backend, which is bound to `pool` (None for models without a cache).

    `adapters` are those on the device, by identity; the mapping may change between steps. `kernel` computes their low-rank
    products, torch's when None. `graphs` replay decoding steps; a string says why there are none.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool | None,
        adapters: Mapping[str, Bound] | None = None,
        kernel: LoraKernel | None = None,
        graphs: DecodeGraphs | str = OFF,
    ) -> None:
        self._model = model
        self._backend = backend
        self._pool = pool
        self._adapters: Mapping[str, Bound] = {} if adapters is None else adapters
        self._batcher = Batcher(model, pool.page_size if pool is not None else None, self._adapters, kernel)
        self._pooled: dict[int, Tensor] = {}  # by sequence: what its head made of the chunks so far
        self._newest: Tensor | None = None  # the tokens that the last step sampled
        self._newest_at: dict[int, int] = {}  # by sequence: which of them is its newest
        self._graphs = graphs
        self._sampling = select_native(model.device)
        backend.bind(model.attention_specs, model.dtype, pool)

    @torch.inference_mode()
    def launch(self, step: StepInput) -> PendingStep:
        """Start computing a step. Nothing is read back from the device here."""
        for sequence in step.ended:
            self._pooled.pop(sequence, None)
        if self._pool is not None:
            self._pool.zero(step.zeros)
            self._pool.copy(step.copies)
        pending = PendingStep(step, self._pooled, self._sampling)
        if not step.chunks:
            return pending
        for group, rows, hidden in self._computed(step, pending):
            if group.task is Task.GENERATE:
                pending.generate(group, rows, hidden, self._model)
            else:
                pools = group.task is not None and self._head(step.chunks[group.sequences[0]]).pooled
                pending.pool(group, rows, pools)
        pending.finish(self._head)
        pending.start()
        # Last: a launch that fails leaves the tokens of the step before, which another one may await.
        self._newest, self._newest_at = pending.newest()
        return pending

    def warmup(self, tokens: int, rows: int) -> None:
        """Run the largest step once: a sequence of `tokens` tokens, then `rows` sequences of one token.

        Nothing of a living sequence is touched: everything is written to the scratch page.
        """
        for length, count in ((tokens, 1), (1, rows)):
            self.launch(StepInput(tuple(self._dummy(-1 - at, length) for at in range(count)))).result()
            # Drops what the runner kept of the dummies. Their ids are negative, so no sequence has them.
            self.launch(StepInput((), zeros=(SCRATCH_PAGE,), ended=tuple(-1 - at for at in range(count)))).result()
        if isinstance(self._graphs, DecodeGraphs):
            for adapted in (False, True) if self._adapters else (False,):
                self._graphs.prepare(adapted=adapted)

    def _computed(self, step: StepInput, pending: PendingStep) -> Iterable[tuple[HeadRows, Tensor, Tensor | None]]:
        """What each head of a step reads and gave, with hidden rows for those that draft: by a graph, or else eagerly."""
        replayed = self._replayed(step)
        if isinstance(replayed, Tensor):
            pending.graph = REPLAYED
            count = len(step.chunks)
            # Only the counts are read of it from here on.
            rows = torch.empty(0, dtype=torch.int64)
            return [(HeadRows(Task.GENERATE, tuple(range(count)), (1,) * count, rows), replayed, None)]
        pending.graph = replayed
        batch = self._batcher.pack(step)
        self._fill_awaited(step, batch.input_ids)
        batch.attention = self._backend.plan(batch)
        output = self._model(batch)
        return zip(batch.head_rows, output.answers, output.hidden, strict=True)

    def _replayed(self, step: StepInput) -> Tensor | str:
        """Logits of a step that a graph takes, else why none does."""
        if isinstance(self._graphs, str):
            return self._graphs
        reason = why_eager(step.chunks)
        if reason is not None:
            return reason
        segments = self._batcher.segments(step.chunks)
        if segments is None:
            return "an adapter with more than low-rank updates"
        logits = self._graphs.run(step.chunks, segments, lambda ids: self._fill_awaited(step, ids))
        if not isinstance(logits, Tensor):
            return logits
        self._batcher.skip()
        # Filtered rows may be looked at again when the next step has overwritten the graph's memory.
        filtered = any(row.sampling.filters for chunk in step.chunks for row in chunk.sampled)
        return logits.clone() if filtered else logits

    def _head(self, chunk: ChunkInput) -> Head:
        """The head that answers for a chunk's sequence."""
        if chunk.own_head and chunk.adapter is not None:
            head = self._adapters[chunk.adapter].head
            assert head is not None, f"adapter {chunk.adapter} has no head"
            return head
        return self._model.head(chunk.task)

    def _fill_awaited(self, step: StepInput, input_ids: Tensor) -> None:
        """Tokens that the step before sampled, which never were on the host."""
        stops = list(accumulate(len(chunk.tokens) for chunk in step.chunks))
        rows: list[int] = []
        tokens: list[int] = []
        for chunk, stop in zip(step.chunks, stops, strict=True):
            if chunk.awaits_token:
                rows.append(stop - 1)
                tokens.append(self._newest_at[chunk.sequence])
        if rows:
            assert self._newest is not None
            input_ids[_tensor(rows, input_ids)] = self._newest[_tensor(tokens, input_ids)]

    def _dummy(self, sequence: int, length: int) -> ChunkInput:
        task = self._model.tasks[0]
        generates = task is Task.GENERATE
        span = range(length - 1, length) if generates else self._model.head(task).span([0] * length, 0)
        pages = -(-length // self._pool.page_size) if self._pool is not None else 0
        return ChunkInput(
            sequence=sequence,
            start=0,
            tokens=array("q", bytes(8 * length)),
            reads=(HeadRead(task, span),),
            pages=array("i", [SCRATCH_PAGE] * pages),
            sampled=(SamplingRow(Sampling(), length),) if generates else (),
            task=task,
            pooled_rows=None if generates else len(span),
        )


class PendingStep:
    """A step that is being computed; `result` waits for it."""

    def __init__(self, step: StepInput, pooled: dict[int, Tensor], sampling: NativeSampling | None) -> None:
        self._step = step
        self._sampling = sampling
        self._transfer = Transfer()
        self._kept = pooled  # the runner's own, changed when the result is in
        self._pooled: dict[int, Tensor] = {}
        self._values: dict[int, int] = {}  # by chunk: the transfer that has its finished answer
        self._generated: list[_Generated] = []
        self.graph = ""  # `REPLAYED`, or why no graph took the step

    def generate(self, group: HeadRows, logits: Tensor, hidden: Tensor | None, model: Model) -> None:
        """Sample from logits `[rows, vocab]`, `group.counts` rows a chunk."""
        made = _Generated(self._step, group, logits, self._transfer, self._sampling)
        if hidden is not None and made.sampled is not None:
            made.speculate(group, hidden, model, self._transfer)
        self._generated.append(made)

    def newest(self) -> tuple[Tensor | None, dict[int, int]]:
        """The sampled tokens on the device, and by sequence which of them is its newest."""
        tokens: list[Tensor] = []
        at: dict[int, int] = {}
        for made in self._generated:
            if made.sampled is not None:
                before = sum(map(len, tokens))
                at |= {sequence: before + offset for sequence, offset in made.newest.items()}
                tokens.append(made.sampled.tokens)
        return (torch.cat(tokens) if len(tokens) > 1 else next(iter(tokens), None)), at

    def pool(self, group: HeadRows, answers: Tensor, pools: bool) -> None:
        """Join a head's answers of this step to those of earlier chunks of the same sequences."""
        parts = answers.unbind(0) if pools else torch.split(answers, list(group.counts))
        for index, part in zip(group.sequences, parts, strict=True):
            chunk = self._step.chunks[index]
            before = None if chunk.restarted else self._kept.get(chunk.sequence)
            if before is not None:
                # Pooling heads give sums `[dim]` that add up; others give rows `[rows, dim]`.
                part = before + part if pools else torch.cat((before, part))
            self._pooled[chunk.sequence] = part

    def finish(self, head_of: Callable[[ChunkInput], Head]) -> None:
        """Let heads turn the rows of whole inputs into answers."""
        groups: dict[tuple[Head, Stage], list[int]] = {}
        for index, chunk in enumerate(self._step.chunks):
            if chunk.pooled_rows is not None:
                groups.setdefault((head_of(chunk), chunk.stage), []).append(index)
        for (head, stage), indices in groups.items():
            chunks = [self._step.chunks[index] for index in indices]
            parts = [self._part(chunk) for chunk in chunks]
            counts = [chunk.pooled_rows or 0 for chunk in chunks]
            match stage:
                case Stage.HIDDEN:
                    made = parts
                case Stage.RAW:
                    made = head.raw(parts, counts)
                case Stage.FINISHED:
                    made = head.finish(parts, counts)
            for index, values in zip(indices, made, strict=True):
                # float32: numpy has no bfloat16.
                self._values[index] = self._transfer.add(values.float())

    def start(self) -> None:
        """Everything is launched: the answers start on their way to the host."""
        self._transfer.start()

    @property
    def revised(self) -> bool:
        """Whether reading the result changed tokens that the device had, so that a step made of them is void."""
        return any(made.sampled is not None and made.sampled.revised for made in self._generated)

    def result(self) -> dict[int, Answer]:
        """Wait for the step; an answer for each sequence that has one."""
        self._transfer.fetch()
        # After the fetch: a step that failed must not change what its retry starts from.
        self._kept |= self._pooled
        answers: dict[int, Answer] = {}
        for index, number in self._values.items():
            answers[self._step.chunks[index].sequence] = Answer(values=self._transfer[number])
        for made in self._generated:
            answers |= made.read(self._transfer)
        return answers

    def _part(self, chunk: ChunkInput) -> Tensor:
        """What the head made of a sequence, this step included: its last chunk may have no row that is read."""
        found = self._pooled.get(chunk.sequence)
        return self._kept[chunk.sequence] if found is None else found


class _Generated:
    """The generating chunks of one group of rows: their sampled tokens, prompt scores and drafts on the way to the host."""

    def __init__(
        self, step: StepInput, group: HeadRows, logits: Tensor, transfer: Transfer, native: NativeSampling | None
    ) -> None:
        self.chunks = [step.chunks[index] for index in group.sequences]
        self._starts = [0, *accumulate(group.counts)][:-1]
        self._counts = group.counts
        self._last = [  # the first sampled row of each chunk, counted in the group
            start + count - len(chunk.sampled)
            for chunk, start, count in zip(self.chunks, self._starts, group.counts, strict=True)
        ]
        rows = [
            first + at for chunk, first in zip(self.chunks, self._last, strict=True) for at in range(len(chunk.sampled))
        ]
        sampling = [row for chunk in self.chunks for row in chunk.sampled]
        self.sampled: Sampled | None = None
        if rows:
            chosen = logits if len(rows) == len(logits) else logits[_tensor(rows, logits)]
            self.sampled = Sampled(chosen, sampling, transfer, native)
        self._scores = self._score(logits, transfer, native)
        self._drafts: int | None = None

    @property
    def newest(self) -> dict[int, int]:
        """By sequence, which sampled token is that of its newest row, for chunks without draft tokens."""
        offsets = [0, *accumulate(len(chunk.sampled) for chunk in self.chunks)]
        return {chunk.sequence: at for chunk, at in zip(self.chunks, offsets, strict=False) if len(chunk.sampled) == 1}

    def speculate(self, group: HeadRows, hidden: Tensor, model: Model, transfer: Transfer) -> None:
        """Draft what follows the last token that stands, on the device: hidden `[rows, hidden]`."""
        assert group.speculator is not None
        assert self.sampled is not None
        most = max(len(chunk.sampled) for chunk in self.chunks)
        firsts = [0, *accumulate(len(chunk.sampled) for chunk in self.chunks)][:-1]
        # Padded with -1, which no token equals: a draft token counts while all before it were right.
        drafts = np.full((len(self.chunks), most), -1, np.int64)
        for row, chunk in zip(drafts, self.chunks, strict=True):
            row[: chunk.drafts] = chunk.tokens[len(chunk.tokens) - chunk.drafts :] if chunk.sampled else ()
        at = np.minimum(np.array(firsts)[:, None] + np.arange(most), max(len(self.sampled.tokens) - 1, 0))
        tokens = self.sampled.tokens[torch.from_numpy(at).to(hidden.device)]  # [chunks, most]
        right = (tokens == torch.from_numpy(drafts).to(hidden.device)).long().cumprod(1).sum(1)  # [chunks]
        # A chunk without sampled rows points one past its rows: clamped here, and read() drops its drafts.
        rows = (_tensor(self._last, hidden) + right).clamp(max=len(hidden) - 1)
        self._drafts = transfer.add(group.speculator.draft(hidden[rows], model.base_logits))

    def read(self, transfer: Transfer) -> dict[int, Answer]:
        """Answers by sequence, once the transfer was fetched."""
        sampled = iter(self.sampled.read()) if self.sampled is not None else iter(())
        drafts = transfer[self._drafts].tolist() if self._drafts is not None else [()] * len(self.chunks)
        answers: dict[int, Answer] = {}
        for chunk, scores, proposed in zip(self.chunks, self._scores, drafts, strict=True):
            own = [next(sampled) for _ in chunk.sampled]
            found = scores.read(chunk.scored.tolist()) if scores is not None else []
            answers[chunk.sequence] = Answer(
                sampled=_verified(own, chunk.tokens[len(chunk.tokens) - chunk.drafts :].tolist()) if own else (),
                prompt_scores=tuple(one for one in found if one is not None),
                drafts=tuple(proposed) if own else (),
            )
        return answers

    def _score(self, logits: Tensor, transfer: Transfer, native: NativeSampling | None) -> list[Scores | None]:
        """Scores of the prompt tokens that the first rows of each chunk predict."""
        made: list[Scores | None] = []
        for chunk, start in zip(self.chunks, self._starts, strict=True):
            count = len(chunk.scored)
            if not count:
                made.append(None)
                continue
            rows, tokens = logits[start : start + count], _tensor(chunk.scored, logits)
            made.append(Scores(rows, tokens, [chunk.prompt_logprobs] * count, transfer, native))
        return made


def _tensor(values: Sequence[int] | array[int], like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64)).to(like.device, non_blocking=True)


def _verified(sampled: list[SampledToken], draft: list[int]) -> tuple[SampledToken, ...]:
    """The sampled tokens up to the first that its draft token had wrong, that one included: each depends on those before."""
    right = 0
    while right < len(sampled) - 1 and sampled[right].token_id == draft[right]:
        right += 1
    return tuple(sampled[: right + 1])
