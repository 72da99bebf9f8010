"""What core must know of any architecture's configuration.

Decides the few fields that heads, caches and the engine read, and how a bad `config.json` is told. Each plugin adds its own
fields; unknown keys of a checkpoint are left alone, for configurations carry much that inference does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lorax_core.errors import CheckpointError


class ModelConfig(BaseModel):
    """A checkpoint's configuration, parsed once and frozen."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_type: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool = False
    architectures: tuple[str, ...] | None = None

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the positions allow, in tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long a sequence may be")

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Bring old spellings of keys to the current one, before validation. A plugin overrides this where it must."""
        return raw

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Read a `config.json`; raises CheckpointError with every field that is missing or wrong."""
        try:
            return cls.model_validate(dict(cls.normalise(raw)))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(step) for step in item['loc']) or 'config'}: {item['msg']} (found {item['input']!r:.60})"
                for item in error.errors()
            )
            raise CheckpointError(
                f"config.json does not describe a {raw.get('model_type')} that {cls.__module__.split('.')[0]} serves: "
                f"{problems}",
                hint="compare it with the config.json that transformers writes for this architecture",
            ) from error
