"""One request's progress.

Decides what a sequence remembers between steps. Knows nothing of tensors: the scheduler plans with it, the loop accepts what
steps bring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorax_core.errors import LoraxError
from lorax_core.kvcache.prefix import PageKey, chain
from lorax_core.types import FinishReason, Task, TokenLogprobs

if TYPE_CHECKING:
    from lorax_core.adapters.residency.handle import AdapterHandle
    from lorax_core.engine.drafting import Drafter
    from lorax_core.engine.grammar import Grammar
    from lorax_core.engine.stopping import StopRule
    from lorax_core.modeling.heads import Head


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is picked, with the meanings of `GenerateRequest`. `temperature` 0 is greedy.

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
    def counts_tokens(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought to a sequence: new tokens and text, its end, its answer, or the error that ended it."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    answer: Any = None  # what the head made of the whole text, float32 on the host
    error: LoraxError | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.answer is not None or self.error is not None


def _nowhere(update: Update) -> None:
    """The sink of a sequence that nobody waits for."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. Of its tokens, prompt and output together, `computed` have been through the model."""

    # Filled by the request.
    task: Task
    prompt: list[int]
    token_types: list[int] | None = None
    adapter: AdapterHandle | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: StopRule | None = None  # generation only
    head: Head | None = None  # the adapter's own; None is the model's for the task
    span: range | None = None  # tokens whose rows the head reads; None is the newest, for generation
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    drafter: Drafter | None = None
    priority: int = 0
    forks: list[Sequence] = field(
        default_factory=list
    )  # further answers to the same prompt, which join once it is computed
    sink: Callable[[Update], None] = _nowhere

    # Filled by the scheduler.
    arrival: int = 0
    turn: int = 0  # when it is served, counted in turns of all adapters
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    reused: int = 0  # tokens found in the cache instead of computed
    draft: list[int] = field(default_factory=list)  # guessed tokens that the step in progress verifies
    page_keys: list[PageKey] = field(default_factory=list)
    preemptions: int = 0  # times that it gave its pages back

    # Filled as steps are accepted.
    output: list[int] = field(default_factory=list)
    output_counts: Counter[int] = field(default_factory=Counter)
    accepted_drafts: int = 0
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    part: Any = None  # what the head made of the rows seen so far
    finished: bool = False

    def __post_init__(self) -> None:
        generating = self.task is Task.GENERATE
        if not self.prompt:
            raise ValueError("a sequence needs at least one token")
        if (self.stop is not None) is not generating or (self.span is None) is not generating:
            raise ValueError("a generating sequence needs a stop rule, others the span that their head reads")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens that have not been through the model, guesses left out."""
        return len(self) - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service, smaller first: its turn, moved forward by priority. Waiting long enough beats any priority."""
        return self.turn - self.priority * PRIORITY_TURNS, self.arrival

    @property
    def salt(self) -> str:
        """What tells its pages, and its place in the queue, from those of other adapters: the identity; empty for the base."""
        return self.adapter.identity if self.adapter is not None else ""

    @property
    def reusable(self) -> int:
        """Tokens from the start whose rows nobody reads, so that a cache may stand in for computing them."""
        if self.prompt_logprobs is not None and not self.prompt_scores:
            return 0
        return self.span.start if self.span is not None else len(self) - 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of prompt, output and guesses together."""
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
