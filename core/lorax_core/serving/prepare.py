"""From a validated request to a sequence, and from its answer to a result.

Decides what of a request this model can answer, and refuses the rest now, with the numbers. Knows nothing of scheduling.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lorax_core.adapters.residency.handle import AdapterHandle
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.engine.drafting import Drafter, PromptLookup, Proposals
from lorax_core.engine.sampler import uniform
from lorax_core.engine.sequence import Sampling, Sequence, Stage
from lorax_core.engine.stopping import StopRule
from lorax_core.errors import CapacityError, RequestError, shown
from lorax_core.modeling.heads import (
    EmbeddingHead,
    Head,
    SequenceClassificationHead,
    TokenClassificationHead,
    pooled_span,
)
from lorax_core.modeling.model import Model
from lorax_core.serving.embedding import shaped
from lorax_core.serving.head_choice import HeadChooser
from lorax_core.serving.labels import relevance, sequence_labels, token_labels
from lorax_core.serving.limits import Limits
from lorax_core.serving.pairs import PairReader, Shorten
from lorax_core.serving.requests import (
    AdapterChoice,
    ClassifyRequest,
    EmbedRequest,
    GenerateRequest,
    Request,
    RerankRequest,
    Truncate,
)
from lorax_core.serving.structured import GrammarFactory
from lorax_core.serving.text import Encoded, TextFront, cut
from lorax_core.serving.tools import CLOSE
from lorax_core.types import Classification, Completion, Embedding, Pooling, Relevance, Task, Tokenized, Usage

Result = Completion | Embedding | Classification | Relevance
Values = NDArray[np.float32]


def _no_values(values: Values) -> Result:
    raise AssertionError(f"a generating sequence has values {values.shape}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sequence, and how the values from its head become the caller's result."""

    sequence: Sequence
    result: Callable[[Values], Result] = _no_values


@dataclass
class Preparer:
    """Makes sequences for one engine. Raises RequestError, CapacityError or AdapterError before any work is done."""

    model: Model
    text: TextFront
    pairs: PairReader
    adapters: AdapterStore
    limits: Limits
    eos_ids: frozenset[int]
    seed: int
    default_task: Task
    grammars: GrammarFactory
    speculate: int = 0
    _count: itertools.count[int] = field(default_factory=itertools.count)
    _heads: HeadChooser = field(init=False)

    def __post_init__(self) -> None:
        self._heads = HeadChooser(self.model, self.adapters, self.default_task)

    @property
    def embedding_dim(self) -> int:
        """Length of the vectors of this engine."""
        return cast("EmbeddingHead", self.model.head(Task.EMBED)).dim

    @property
    def max_text_tokens(self) -> int:
        """The longest input to embed or classify."""
        return min(self.limits.tokens, self.text.max_tokens or self.limits.tokens)

    def count_tokens(self, prompt: Any, adapter: AdapterChoice) -> int:
        """Tokens of a prompt or input, as an adapter reads it."""
        # An encoder's text gets the prompt and casing of its sentence files, which count.
        generating = Task.GENERATE in self.model.tasks
        text = self._text(self._adapter(adapter))
        return len(text.encode(prompt, Task.GENERATE if generating else Task.EMBED).ids)

    def tokenize(self, text: Any, adapter: AdapterChoice) -> Tokenized:
        """A text as tokens, as an adapter reads it."""
        front = self._text(self._adapter(adapter))
        # The task whose encoding knows where in the text each token lies, and adds no prompt of sentence files.
        encoded = front.encode(text, Task.TOKEN_CLASSIFICATION)
        special = list(encoded.special or [False] * len(encoded.ids))
        return Tokenized(encoded.ids, front.tokens(encoded.ids), list(encoded.offsets), special)

    def detokenize(self, token_ids: list[int], adapter: AdapterChoice) -> str:
        """Token ids as text, as an adapter writes it."""
        return self._text(self._adapter(adapter)).decode(self._known(token_ids))

    def token_bytes(self, token_ids: list[int], *, special: bool) -> list[bytes]:
        """The bytes of each token."""
        return self.text.token_bytes(self._known(token_ids), special=special)

    def _known(self, token_ids: list[int]) -> list[int]:
        checked = EmbedRequest(input=token_ids).input
        if not isinstance(checked, list):
            raise RequestError(f"token_ids: a list of numbers, not {shown(token_ids)}", hint="tokenize(text).ids")
        self._check_tokens("token_ids", checked)
        return checked

    def prepare(self, request: Request) -> Prepared:
        """The sequence of a request, and how its answer becomes a result."""
        match request:
            case GenerateRequest():
                return self._generate(request)
            case EmbedRequest():
                return self._embed(request)
            case ClassifyRequest():
                return self._classify(request)
            case RerankRequest():
                return self._rerank(request)

    def _generate(self, request: GenerateRequest) -> Prepared:
        adapter = self._adapter(request.adapter)
        # For its error: a model without this head refuses before the text is tokenized.
        self._heads.check_generating(adapter, request.adapter)
        text = self._text(adapter)
        encoded = self._checked(
            text.encode(request.prompt, Task.GENERATE, tools=request.tools, template_options=request.template_options),
            "prompt",
        )
        if request.truncate_prompt_tokens is not None:
            encoded = cut(encoded, request.truncate_prompt_tokens, "start")
        # All of max_tokens must fit: the completion would otherwise end before it, without an error.
        room = self.limits.tokens - len(encoded.ids)
        if room < 1 or (request.max_tokens or 1) > room:
            asked = f" and {request.max_tokens} more asked for" if request.max_tokens else ""
            raise CapacityError(
                f"a prompt of {len(encoded.ids)} tokens{asked} is too long: {self.limits.describe()}",
                hint=self.limits.hint(needed := len(encoded.ids) + (request.max_tokens or 1)),
                http_hint=self.limits.http_hint(needed),
                option="max_tokens" if room > 0 else "prompt",
            )
        self._check_tokens("logit_bias", request.logit_bias)
        self._check_tokens("stop_token_ids", request.stop_token_ids)
        # `ignore_eos` does not drop ids that the request names itself.
        ends = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self._eos(text))
        strings = [*request.stop, *([CLOSE] if request.tools and not request.parallel_tool_calls else [])]
        stop = StopRule(request.max_tokens or room, request.min_tokens, ends, tuple(strings))
        # Without a tokenizer a completion has no text in which a string could be found.
        if stop.strings and not text.has_tokenizer:
            raise RequestError(
                f"stop strings {list(stop.strings)!r} need a tokenizer, which this checkpoint lacks",
                hint="give stop_token_ids, or add tokenizer.json to the checkpoint",
            )
        grammar = self.grammars.grammar(request, text.tokenizer, self._eos(text))
        first = Sequence(
            task=Task.GENERATE,
            prompt=encoded.ids,
            adapter=adapter,
            sampling=self._sampling(request),
            stop=stop,
            prompt_logprobs=request.prompt_logprobs,
            grammar=grammar,
            decoder=text if text is not self.text else None,
            # A grammar must see each token before it knows what may follow, so it cannot verify draft tokens.
            drafter=self._drafter(_drafts(adapter)) if grammar is None else None,
            speculates=grammar is None and _drafts(adapter),
            priority=request.priority,
        )
        # Forks are sequences of their own that share the pages of the first one's prompt.
        first.forks = [self._fork(first, choice) for choice in range(1, request.n)]
        return Prepared(first)

    def _sampling(self, request: GenerateRequest) -> Sampling:
        seed = request.seed
        if seed is None:  # each unseeded request differs from the last, and an engine's run can be repeated
            # 53 bits, as many as a float64 in [0, 1) has.
            seed = int(uniform(self.seed, 0, next(self._count)) * (1 << 53))
        return Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            typical_p=request.typical_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=tuple(request.logit_bias.items()),
            logprobs=request.logprobs,
            seed=seed,
        )

    def _fork(self, first: Sequence, choice: int) -> Sequence:
        """A further answer to the same prompt; prompt scores are the first one's."""
        return Sequence(
            task=first.task,
            prompt=first.prompt,
            adapter=first.adapter,
            # The seed stays: `choice` is what makes the answers differ.
            sampling=replace(first.sampling, choice=choice),
            stop=first.stop,
            # Grammar and drafter have state, so each answer needs its own.
            grammar=first.grammar.copy() if first.grammar is not None else None,
            decoder=first.decoder,
            drafter=self._drafter(first.speculates) if first.drafter is not None else None,
            speculates=first.speculates,
            priority=first.priority,
        )

    def _drafter(self, by_adapter: bool) -> Drafter | None:
        """What drafts tokens: the adapter's heads where it has some, else prompt lookup where that is asked for."""
        if by_adapter:
            return Proposals()
        return PromptLookup(self.speculate) if self.speculate else None

    def _check_tokens(self, option: str, tokens: Collection[int]) -> None:
        vocab = self.model.config.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
            wrong = next(token for token in tokens if not 0 <= token < vocab)
            raise RequestError(
                f"{option}: token id {wrong} is not in the vocabulary: ids are 0 to {vocab - 1}",
                hint="the ids are those of this checkpoint's own tokenizer",
                option=option,
            )

    def _embed(self, request: EmbedRequest) -> Prepared:
        head = cast("EmbeddingHead", self.model.head(Task.EMBED))
        rows, dimensions = request.pooling == "none", request.dimensions
        self._check_dimensions(dimensions, self.model.config.hidden_size if rows else head.dim)
        adapter = self._adapter(request.adapter)
        text = self._text(adapter)
        prompt = request.prompt if request.prompt_name is None else text.prompt_named(request.prompt_name)
        encoded = self._fitted(text.encode(request.input, Task.EMBED, prompt), request.truncate)
        usage = Usage(len(encoded.ids))
        normal = request.normalize if request.normalize is not None else head.normalize and not rows
        stage = Stage.HIDDEN if rows else Stage.RAW if head.normalize and not normal else Stage.FINISHED
        span = head.span(encoded.ids, encoded.pool_from)
        if rows:
            span = range(len(encoded.ids))
        elif request.pooling is not None:
            span = pooled_span(Pooling(request.pooling), len(encoded.ids), encoded.pool_from)
        sequence = self._read(head, encoded, adapter, stage, span)
        # The head has normalised whole vectors already where it does so by itself.
        scale = normal and (rows or not head.normalize or dimensions is not None)
        return Prepared(
            sequence,
            lambda values: Embedding(shaped(values, dimensions, scale=scale), usage, encoded.truncated),
        )

    def _check_dimensions(self, wanted: int | None, most: int) -> None:
        if wanted is not None and wanted > most:
            raise RequestError(
                f"dimensions: {wanted} were asked for, and the vectors of this checkpoint have {most}",
                hint=f"give 1 to {most}, or leave it out",
                option="dimensions",
            )

    def _classify(self, request: ClassifyRequest) -> Prepared:
        adapter = self._adapter(request.adapter)
        head, text = self._heads.classifying(adapter), self._text(adapter)
        encoded = self._fitted(text.encode(request.input, head.task), request.truncate)
        sequence = self._read(head, encoded, adapter, Stage.RAW if request.raw_scores else Stage.FINISHED)
        if isinstance(head, TokenClassificationHead):
            labels, source = head.labels, request.input
            return Prepared(sequence, lambda values: token_labels(values, labels, encoded, source, text))
        labels = cast("SequenceClassificationHead", head).labels
        return Prepared(sequence, lambda values: sequence_labels(values, labels, encoded))

    def _rerank(self, request: RerankRequest) -> Prepared:
        adapter = self._adapter(request.adapter)
        head = self._heads.scoring(adapter)
        pair, shorten = self.pairs.over(self._text(adapter)).encode(request.query, request.document, head)
        encoded = self._fitted(pair, request.truncate, shorten)
        sequence = self._read(head, encoded, adapter, Stage.RAW)
        return Prepared(sequence, lambda values: relevance(values, encoded, normalize=request.normalize))

    def _fitted(self, encoded: Encoded, truncate: Truncate, shorten: Shorten = cut) -> Encoded:
        """The ids of an input, truncated to what the checkpoint takes when the request allows it."""
        encoded = self._checked(encoded, "input")
        # Not `limits.tokens`: a tokenizer or sentence files may allow less than the positions.
        limit = self.max_text_tokens
        if len(encoded.ids) <= limit:
            return encoded
        if truncate == "error":
            raise CapacityError(
                f"an input of {len(encoded.ids)} tokens is too long: this checkpoint takes {limit} ({self.limits.describe()})",
                hint="truncate='end' or truncate='start' shortens it",
                http_hint="shorten it, or have it cut: TEI's routes take truncate, and /v1/rerank truncate_prompt_tokens",
                option="input",
            )
        return shorten(encoded, limit, truncate)

    def _read(
        self,
        head: Head,
        encoded: Encoded,
        adapter: AdapterHandle | None,
        stage: Stage = Stage.FINISHED,
        span: range | None = None,
    ) -> Sequence:
        return Sequence(
            task=head.task,
            prompt=encoded.ids,
            token_types=encoded.token_types,
            adapter=adapter,
            # The engine then takes the head from the bound adapter, on its device.
            own_head=adapter is not None and head is adapter.head,
            span=span if span is not None else head.span(encoded.ids, encoded.pool_from),
            stage=stage,
        )

    def _adapter(self, wanted: AdapterChoice) -> AdapterHandle | None:
        if wanted is None:
            return None
        # Empty on the usual way, as `Engine.submit` fetched already; it may have been dropped again since.
        missing = self.adapters.missing(wanted)
        if missing:
            self.adapters.fetch(missing).result()
        return self.adapters.get(wanted)

    def _text(self, adapter: AdapterHandle | None) -> TextFront:
        """What reads and writes the text of a row: what its adapter brings, else the checkpoint's."""
        own = adapter.text if adapter is not None else None
        return cast("TextFront", own) if own is not None else self.text

    def _eos(self, text: TextFront) -> frozenset[int]:
        """What ends a completion; a tokenizer that an adapter brings may name another end than the base's does."""
        own = text.eos_token_id
        differs = own is not None and own != self.text.eos_token_id and own < self.model.config.vocab_size
        return self.eos_ids | {own} if differs and own is not None else self.eos_ids

    def _checked(self, encoded: Encoded, option: str) -> Encoded:
        if not encoded.ids:
            raise RequestError(
                "the prompt is empty",
                hint="give at least one token; this tokenizer adds none of its own",
                option=option,
            )
        self._check_tokens(option, encoded.ids)
        return encoded


def _drafts(adapter: AdapterHandle | None) -> bool:
    """Whether an adapter has heads that draft tokens."""
    return adapter is not None and adapter.draft_tokens > 0
