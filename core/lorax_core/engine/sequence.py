"""One request's progress.

Decides what a sequence remembers between steps. Knows nothing of tensors: the scheduler plans with it, the loop accepts what
steps compute.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from lorax_core.engine.detokenizer import TextDecoder
from lorax_core.engine.drafting import Drafter
from lorax_core.engine.grammar import Grammar
from lorax_core.engine.stopping import StopRule
from lorax_core.errors import LoraxError
from lorax_core.kvcache.prefix import PageKey, chain
from lorax_core.types import FinishReason, Task, TokenLogprobs


class Stage(StrEnum):
    """How far the rows of a whole input go: as the backbone left them, through the head (logits), to its answer."""

    HIDDEN = "hidden"
    RAW = "raw"
    FINISHED = "finished"


class AdapterRef(Protocol):
    """What the engine must know of an adapter: equal identities are equal content. Holding the handle keeps it loadable."""

    @property
    def identity(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is sampled, with the meanings of `GenerateRequest`. `temperature` 0 is greedy.

    `choice` numbers the answers to one prompt; together with `seed` and the position it makes each draw its own.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int = 0
    choice: int = 0

    @property
    def filters(self) -> bool:
        """Whether tokens are left out by their probability."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1

    @property
    def counts_tokens(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class TokenCounts:
    """How often each token of a sequence was generated; 0 for tokens of the prompt alone. Kept up token by token."""

    __slots__ = ("_at", "counts", "ids")

    def __init__(self, prompt: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt))
        self.counts = array("q", bytes(8 * len(self.ids)))
        self._at = {token: at for at, token in enumerate(self.ids)}

    def add(self, token: int) -> None:
        """One more generated token."""
        at = self._at.get(token)
        if at is None:
            at = self._at[token] = len(self.ids)
            self.ids.append(token)
            self.counts.append(0)
        self.counts[at] += 1

    def snapshot(self, drafts: Iterable[int] = ()) -> TokenCounts:
        """The counts as they would be with some draft tokens accepted; later tokens do not change it."""
        copy = TokenCounts(())
        # `_at` stays empty unless drafts are added: the sampler reads only the two arrays.
        copy.ids, copy.counts = self.ids[:], self.counts[:]
        drafts = list(drafts)
        if drafts:
            copy._at = dict(self._at)
            for token in drafts:
                copy.add(token)
        return copy

    def __getstate__(self) -> tuple[bytes, bytes]:
        return self.ids.tobytes(), self.counts.tobytes()

    def __setstate__(self, state: tuple[bytes, bytes]) -> None:
        self.ids, self.counts = array("q", state[0]), array("q", state[1])
        self._at = {token: at for at, token in enumerate(self.ids)}


@dataclass(slots=True)  # not frozen: that takes five times as long, at each row
class SequenceUpdate:
    """What a step gave a sequence: new tokens and text, its end, its answer, or the error that ended it."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    answer: Any = None  # what the head computed from the whole input, float32 on the host
    error: LoraxError | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.answer is not None or self.error is not None


def discard(update: SequenceUpdate) -> None:
    """The sink of a sequence without a waiting caller: drops its results."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress. Of its tokens, prompt and output together, `computed` have been through the model."""

    # Filled by the request.
    task: Task
    prompt: list[int]
    token_types: list[int] | None = None  # not of one that generates
    adapter: AdapterRef | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: StopRule | None = None  # generation only
    own_head: bool = False  # the adapter's head answers, not the model's
    span: range | None = None  # tokens whose rows the head reads; None is the newest, for generation
    stage: Stage = Stage.FINISHED
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    decoder: TextDecoder | None = None  # of its text, in place of the engine's
    drafter: Drafter | None = None
    speculates: bool = False  # the adapter drafts tokens, which come back with the step's answer
    priority: int = 0
    forks: list[Sequence] = field(default_factory=list)  # further answers to the same prompt: join once it is computed
    sink: Callable[[SequenceUpdate], None] = discard

    started: float | None = None  # when its first step began, by `time.monotonic`; filled by the loop

    # Filled by the scheduler.
    id: int = 0  # counts arrivals in one engine from 1
    turn: int = 0  # when it is served, counted in turns of all adapters
    computed: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    reused: int = 0  # tokens found in the cache instead of computed
    draft: list[int] = field(default_factory=list)  # draft tokens that the step in progress verifies
    restarted: bool = True  # nothing of the rows before the next chunk is kept in the runner
    page_keys: list[PageKey] = field(default_factory=list)
    preemptions: int = 0
    ahead: int = 0  # rows past `computed`, of a step launched before the result of the one in progress was known

    # Filled as steps are accepted.
    output: list[int] = field(default_factory=list)
    counts: TokenCounts | None = None  # where penalties ask for them
    accepted_drafts: int = 0
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    stop_string: str | None = None  # the one that was found
    finished: bool = False

    def __post_init__(self) -> None:
        generating = self.task is Task.GENERATE
        if not self.prompt:
            raise ValueError("a sequence needs at least one token")
        if (self.stop is not None) is not generating or (self.span is None) is not generating:
            raise ValueError("a generating sequence needs a stop rule, others the span that their head reads")
        if generating and self.token_types is not None:
            raise ValueError("a generating sequence has no token types: its answer would have none")
        self.pages = array("i", self.pages)
        if self.sampling.counts_tokens:
            self.counts = TokenCounts(self.prompt)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens that have not been through the model, draft tokens not counted."""
        return len(self) - self.computed

    @property
    def needs_host(self) -> bool:
        """Whether its next token depends on more of the one before than the device knows."""
        if self.grammar is not None or self.counts is not None or self.drafter is not None:
            return True
        return self.speculates or bool(self.forks)

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service, smaller first: its turn, moved forward by priority. Waiting long enough beats any priority."""
        return self.turn - self.priority * PRIORITY_TURNS, self.id

    @property
    def salt(self) -> str:
        """Separates its pages, and its place in the queue, from those of other adapters: the identity; empty for the base."""
        return self.adapter.identity if self.adapter is not None else ""

    @property
    def reusable(self) -> int:
        """Tokens from the start whose rows no head reads, so that a cache may stand in for computing them."""
        if self.prompt_logprobs is not None and not self.prompt_scores:
            return 0
        return self.span.start if self.span is not None else len(self) - 1

    def append(self, token: int) -> None:
        """One more generated token."""
        self.output.append(token)
        if self.counts is not None:
            self.counts.add(token)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of prompt, output and draft tokens together."""
        edge, end = len(self.prompt), len(self)
        found = self.prompt[start:stop] if start < edge else []
        if stop > edge and start < end:
            found += self.output[max(start - edge, 0) : stop - edge]
        if stop > end:
            found += self.draft[max(start - end, 0) : stop - end]
        return found

    def keys(self, count: int, page_size: int) -> list[PageKey]:
        """Keys of the first `count` full pages of prompt and output."""
        salt = self.salt
        while len(self.page_keys) < count:
            start = len(self.page_keys) * page_size
            before = self.page_keys[-1] if self.page_keys else None
            self.page_keys.append(chain(before, salt, self.tokens(start, start + page_size)))
        return self.page_keys[:count]


PRIORITY_TURNS = 1000
"""How many turns one step of priority is worth."""
