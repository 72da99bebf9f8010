"""Tasks, results and events that every floor shares.

Decides what callers get back. Knows nothing of tensors, models or plugins; numpy is named for type checkers only, so that
importing this module stays cheap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Task(StrEnum):
    """What a request wants of a model, and so which head answers it."""

    GENERATE = "generate"
    EMBED = "embed"
    TOKEN_CLASSIFICATION = "token-classification"
    SEQUENCE_CLASSIFICATION = "sequence-classification"


class Pooling(StrEnum):
    """How the rows of one input become one vector."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "last"


class FinishReason(StrEnum):
    """Why a completion ended: a stop token or string, or a limit of length."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request cost.

    `cached_tokens` of the prompt were found in the cache; `accepted_tokens` of the completion were draft tokens that the
    model confirmed.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before penalties and temperature, at one position of a sequence.

    `top` has the most likely tokens, as many as were asked for, most likely first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a generating request. `text` leaves out special tokens and the stop string.

    `logprobs` has an entry for each token of `token_ids` and `prompt_logprobs` one for each token of the prompt (None for the
    first, which nothing predicts), where they were asked for. Of a request for `n` answers this is the first, and
    `alternatives` are the others. `stop_reason` is the id of the token or the string that ended it; None where it ended by its
    length, or because its constraint allows nothing more.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    alternatives: list[Completion] = field(default_factory=list)
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer to an embedding request. `vector` is float32 `[dim]`; `truncated` says that the input lost tokens.

    With `pooling="none"` it is `[tokens, dim]`, a row for each token, special ones included.
    """

    vector: NDArray[np.float32]
    usage: Usage
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Entity:
    """Neighbouring tokens of one B-/I- label: its name without the prefix, mean score, text and character range."""

    label: str
    score: float
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer to a classifying request; `labels` and `scores` run parallel.

    Of tokens: the best label of each token (special tokens left out), with `tokens`, character `offsets` and, for B-/I-
    labels, `entities`. Offsets need a tokenizer and a string: token ids have none. Of a whole input: every label by falling
    score, and no tokens. Scores are probabilities (independent ones when multi-label; the raw value of a
    regression), or logits where the request asked for them.
    """

    labels: list[str]
    scores: list[float]
    usage: Usage
    tokens: list[str] | None = None
    offsets: list[tuple[int, int]] | None = None
    entities: list[Entity] | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A text as tokens: their ids, the tokenizer's own spelling of them, and their character ranges in the text.

    `special` marks those that the tokenizer added.
    """

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    special: list[bool]


@dataclass(frozen=True, slots=True)
class Relevance:
    """The answer to a reranking request: how well the document answers the query, larger for better.

    `truncated` says that the pair lost tokens.
    """

    score: float
    usage: Usage
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document among others: its place in the list that was given, and its score."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of a stream.

    `index` counts the prompts of the call from 0, `choice` the answers to one prompt; `text` and `token_ids` are new since
    the last event of that answer (text may lag behind tokens: a character is never split), and so are `logprobs`, where they
    were asked for. The last event of an answer carries the whole `completion`.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    choice: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
