"""What core must know of any architecture's configuration.

Decides the few fields that heads, caches and the engine read, and how a bad `config.json` is told. Each plugin adds its own
fields; unknown keys of a checkpoint are left alone, for configurations carry much that inference does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from lorax_core.errors import CheckpointError


class Problem(StrEnum):
    """What the numbers of a sequence classifier mean, as `problem_type` in a `config.json`."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


class ModelConfig(BaseModel):
    """A checkpoint's configuration, parsed once and frozen."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_type: str
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    num_hidden_layers: PositiveInt
    tie_word_embeddings: bool = False
    architectures: tuple[str, ...] | None = None
    pad_token_id: int | None = None
    id2label: dict[int, str] | None = None
    num_labels: int | None = None
    problem_type: Problem | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes in the order of the classifier's rows; transformers' `LABEL_i` (two) when none are given."""
        if self.id2label:
            return tuple(self.id2label[index] for index in sorted(self.id2label))
        return tuple(f"LABEL_{index}" for index in range(self.num_labels or 2))

    @property
    def problem(self) -> Problem:
        """What a sequence classifier's scores mean; a single class without a stated problem is a regression."""
        if self.problem_type is not None:
            return self.problem_type
        return Problem.REGRESSION if len(self.labels) == 1 else Problem.SINGLE_LABEL

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the positions allow, in tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long a sequence may be")

    @property
    def generates(self) -> bool:
        """Whether a text can be continued: not where rows see what comes after them."""
        return True

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
