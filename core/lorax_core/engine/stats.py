"""What steps did, in numbers.

Decides which numbers are kept of a step and of all of them, for metrics and `engine.info()`. Knows nothing of who reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step.

    Tokens by kind: `prompt_tokens` were computed of inputs, `decode_tokens` are newest tokens of answers, `draft_tokens` were
    verified. `rows` is the number of sequences in the step; `running` and `waiting` count sequences after it, and after
    cancellations since; so do `pages_used` and `pages` of the KV cache (0 without one). `seconds` is the step's own time.
    `graph` is "replayed" for a step that a captured graph took, else why none did.
    """

    prompt_tokens: int
    decode_tokens: int
    draft_tokens: int
    rows: int
    running: int
    waiting: int
    pages_used: int
    pages: int
    seconds: float
    graph: str = ""


@dataclass(frozen=True, slots=True)
class Totals:
    """All steps since the engine was loaded.

    Tokens by kind and `seconds` as in `StepStats`, summed up. `finished` and `failed` count answers, of which a request has
    `n`; those that were cancelled are in neither. `graphs` counts the steps by their `graph`.
    """

    steps: int = 0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    finished: int = 0
    failed: int = 0
    seconds: float = 0.0
    graphs: Mapping[str, int] = field(default_factory=dict)

    def after(self, step: StepStats) -> Totals:
        """With one more step."""
        return replace(
            self,
            steps=self.steps + 1,
            prompt_tokens=self.prompt_tokens + step.prompt_tokens,
            decode_tokens=self.decode_tokens + step.decode_tokens,
            draft_tokens=self.draft_tokens + step.draft_tokens,
            seconds=self.seconds + step.seconds,
            graphs={**self.graphs, step.graph: self.graphs.get(step.graph, 0) + 1},
        )
