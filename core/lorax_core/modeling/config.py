"""What core must know of any architecture's configuration.

Decides the few fields that heads, caches and the engine read, and how a bad `config.json` is reported. Each plugin adds its own
fields; unknown keys of a checkpoint are left alone, for configurations carry much that inference does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, ValidationInfo, model_validator

from lorax_core.errors import CheckpointError


class Problem(StrEnum):
    """What the numbers of a sequence classifier mean, as `problem_type` in a `config.json`."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


class ModelConfig(BaseModel):
    """A checkpoint's configuration, parsed once and frozen.

    `aliases` maps an architecture's own keys to the common ones (`{"n_embd": "hidden_size"}`), which win where a file has both;
    errors name a key as the file spells it. `own_head_dim` says that heads have a size of their own, so that `hidden_size` need
    not be a multiple of their number.
    """

    # `protected_namespaces=()`: pydantic reserves names that begin with `model_`, and `model_type` is the key in files.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {}
    own_head_dim: ClassVar[bool] = False

    model_type: str
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
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
            # JSON has string keys in any order; pydantic made them int, so 10 sorts behind 9 and not behind 1.
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

    @model_validator(mode="after")
    def _heads_share_the_width(self, info: ValidationInfo) -> Self:
        if not self.own_head_dim and self.hidden_size % self.num_attention_heads:
            spelt = (info.context or {}).get("spelt", {})
            width, heads = (spelt.get(name, name) for name in ("hidden_size", "num_attention_heads"))
            raise ValueError(f"{width} {self.hidden_size} is not a multiple of {heads} {self.num_attention_heads}")
        return self

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Derive fields that a file leaves out, before validation; keys have their common names. A plugin overrides this."""
        return raw

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Read a `config.json`; raises CheckpointError with every field that is missing or wrong."""
        # The architecture's own key is read only where the common one is absent, and null counts as absent.
        own = {key: common for key, common in cls.aliases.items() if raw.get(common) is None}
        named = {**raw, **{common: raw[key] for key, common in own.items() if raw.get(key) is not None}}
        spelt = {common: key for key, common in own.items() if raw.get(key) is not None or common not in raw}
        try:
            return cls.model_validate(dict(cls.normalise(named)), context={"spelt": spelt})
        except (
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
        ) as error:  # the plugin's normalise read what is not there
            raise CheckpointError(
                f"config.json does not describe a {raw.get('model_type')}: {cls.__name__}.normalise failed with "
                f"{type(error).__name__}: {error}",
                hint="compare it with the config.json that transformers writes for this architecture",
            ) from error
        except ValidationError as error:
            raise CheckpointError(
                f"config.json does not describe a {raw.get('model_type')} that {cls.__module__.split('.')[0]} supports: "
                + "; ".join(_problem(item, spelt) for item in error.errors()),
                hint="compare it with the config.json that transformers writes for this architecture",
            ) from error


def _problem(item: Mapping[str, Any], spelt: Mapping[str, str]) -> str:
    """One failed field, by the name that the file gives it."""
    where = ".".join(spelt.get(str(step), str(step)) for step in item["loc"]) or "config"
    return f"{where}: {item['msg']} (found {item['input']!r:.60})"
