"""How long a sequence may be.

Decides which of two limits counts, and what helps against it. Knows nothing of models or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHORTER = "shorten the prompt, or ask for fewer tokens"


@dataclass(frozen=True)
class Limits:
    """What one sequence may measure in tokens: by the model's positions, and by its cache (None without one)."""

    model_tokens: int
    cache_tokens: int | None

    @property
    def tokens(self) -> int:
        return self.model_tokens if self.cache_tokens is None else min(self.model_tokens, self.cache_tokens)

    def describe(self) -> str:
        """The limits as a sentence for errors."""
        cache = "" if self.cache_tokens is None else f", the KV cache {self.cache_tokens}"
        return f"the model holds {self.model_tokens}{cache}"

    def hint(self, needed: int) -> str:
        """What makes room for a sequence of so many tokens."""
        cache = self.cache_tokens
        # Only where the cache is what limits: no cache helps beyond the model's positions.
        if cache is not None and cache < needed <= self.model_tokens:
            return f"load(..., kv_cache_tokens={needed}) makes room, where memory allows"
        return _SHORTER

    def http_hint(self, needed: int) -> str:
        """The same for a client of a server, who may ask its operator."""
        return _SHORTER if self.hint(needed) == _SHORTER else f"{_SHORTER}; the server has --kv-cache-tokens for more"
