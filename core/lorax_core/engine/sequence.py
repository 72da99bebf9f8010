"""One request's progress.

Decides what a sequence remembers between steps. Knows nothing of tensors: the scheduler plans with it, the runner fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorax_core.errors import LoraxError
from lorax_core.types import FinishReason, Task

if TYPE_CHECKING:
    from lorax_core.adapters.base import Adapter
    from lorax_core.engine.stopping import StopRule


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is picked. `temperature` 0 is greedy; the others then have no effect."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought to a sequence: new tokens and text, its end, its answer, or the error that ended it."""

    token_ids: tuple[int, ...] = ()
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
    adapter: Adapter | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: StopRule | None = None  # generation only
    span: range | None = None  # tokens whose rows the head reads; None is the newest, for generation
    sink: Callable[[Update], None] = _nowhere

    # Filled by the scheduler.
    arrival: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)

    # Filled as steps are accepted.
    output: list[int] = field(default_factory=list)
    part: Any = None  # what the head made of the rows seen so far
    finished: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a sequence needs at least one token")
        if (self.stop is None) is (self.task is Task.GENERATE) or (self.span is None) is not (
            self.task is Task.GENERATE
        ):
            raise ValueError("a generating sequence needs a stop rule, others the span that their head reads")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens that have not been through the model."""
        return len(self) - self.computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of prompt and output together."""
        edge = len(self.prompt)
        if stop <= edge:
            return self.prompt[start:stop]
        if start >= edge:
            return self.output[start - edge : stop - edge]
        return self.prompt[start:] + self.output[: stop - edge]
