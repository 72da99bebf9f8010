"""What a step did, in numbers.

Decides which numbers are kept of a step, for metrics and `engine.info()`. Knows nothing of who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step.

    Tokens by kind: `prompt_tokens` were computed of inputs, `decode_tokens` are newest tokens of answers, `draft_tokens` were
    verified. `rows` is the number of sequences in the step; `running` and `waiting` count sequences after it, and after
    cancellations since; so do `pages_used` and `pages` of the KV cache (0 without one). `seconds` is the step's own time.
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
