"""From a validated request to a sequence.

Decides what of a request this model can answer, and refuses the rest now, with the numbers. Knows nothing of scheduling.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from lorax_core.adapters.store import AdapterStore
from lorax_core.engine.sampler import uniform
from lorax_core.engine.sequence import Sampling, Sequence
from lorax_core.engine.stopping import StopRule
from lorax_core.errors import CapacityError, RequestError
from lorax_core.modeling.model import Model
from lorax_core.serving.requests import EmbedRequest, GenerateRequest, Request
from lorax_core.serving.text import Encoded, TextFront, cut
from lorax_core.types import Task


@dataclass(frozen=True)
class Limits:
    """What one sequence may measure in tokens: by the model's positions, and by its cache (None without one)."""

    model_tokens: int
    cache_tokens: int | None

    @property
    def tokens(self) -> int:
        return self.model_tokens if self.cache_tokens is None else min(self.model_tokens, self.cache_tokens)

    def told(self) -> str:
        """The limits as a sentence for errors."""
        cache = "" if self.cache_tokens is None else f", the KV cache {self.cache_tokens}"
        return f"the model holds {self.model_tokens}{cache}"


@dataclass
class Preparer:
    """Makes sequences for one engine. Raises RequestError, CapacityError or AdapterError before any work is done."""

    model: Model
    text: TextFront
    adapters: AdapterStore
    limits: Limits
    eos_ids: frozenset[int]
    seed: int
    _count: itertools.count[int] = field(default_factory=itertools.count)

    def sequence(self, request: Request) -> tuple[Sequence, bool]:
        """The sequence of a request, and whether its text was cut."""
        if isinstance(request, GenerateRequest):
            return self._generate(request), False
        return self._embed(request)

    def _generate(self, request: GenerateRequest) -> Sequence:
        self.model.head(Task.GENERATE)
        encoded = self._checked(self.text.encode(request.prompt, Task.GENERATE))
        room = self.limits.tokens - len(encoded.ids)
        if room < 1 or (request.max_tokens or 1) > room:
            asked = f" and {request.max_tokens} more asked for" if request.max_tokens else ""
            raise CapacityError(
                f"a prompt of {len(encoded.ids)} tokens{asked} is too long: {self.limits.told()}",
                hint=self._capacity_hint(len(encoded.ids) + (request.max_tokens or 1)),
            )
        seed = request.seed
        if seed is None:  # each unseeded request differs from the last, and an engine's run can be repeated
            seed = int(uniform(self.seed, next(self._count)) * (1 << 53))
        stop = StopRule(
            max_tokens=request.max_tokens or room,
            token_ids=frozenset() if request.ignore_eos else self.eos_ids,
            strings=tuple(request.stop),
        )
        if stop.strings and not self.text.has_tokenizer:
            raise RequestError(f"stop strings {list(stop.strings)!r} need a tokenizer, which this checkpoint lacks")
        return Sequence(
            task=Task.GENERATE,
            prompt=encoded.ids,
            token_types=None,
            adapter=self.adapters.get(request.adapter) if request.adapter is not None else None,
            sampling=Sampling(request.temperature, request.top_k, request.top_p, request.min_p, seed),
            stop=stop,
        )

    def _embed(self, request: EmbedRequest) -> tuple[Sequence, bool]:
        self.model.head(Task.EMBED)
        encoded = self._checked(self.text.encode(request.input, Task.EMBED))
        limit = min(self.limits.tokens, self.text.max_tokens or self.limits.tokens)
        if len(encoded.ids) > limit:
            if request.truncate == "error":
                raise CapacityError(
                    f"a text of {len(encoded.ids)} tokens is too long: this checkpoint takes {limit} ({self.limits.told()})",
                    hint="truncate='end' or truncate='start' cuts it",
                )
            encoded = cut(encoded, limit, request.truncate)
        adapter = self.adapters.get(request.adapter) if request.adapter is not None else None
        sequence = Sequence(
            task=Task.EMBED,
            prompt=encoded.ids,
            token_types=encoded.token_types,
            adapter=adapter,
            pool_from=min(encoded.pool_from, len(encoded.ids) - 1),
        )
        return sequence, encoded.truncated

    def _checked(self, encoded: Encoded) -> Encoded:
        if not encoded.ids:
            raise RequestError(
                "the prompt is empty", hint="give at least one token; this tokenizer adds none of its own"
            )
        vocab = self.model.config.vocab_size
        wrong = next((token for token in encoded.ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is not in the vocabulary, whose ids are 0 to {vocab - 1}")
        return encoded

    def _capacity_hint(self, needed: int) -> str:
        cache = self.limits.cache_tokens
        if cache is not None and cache < needed <= self.limits.model_tokens:
            return f"load(..., kv_cache_tokens={needed}) makes room, where memory allows"
        return "shorten the prompt, or ask for fewer tokens"
