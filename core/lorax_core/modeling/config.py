"""What core must know of any architecture's configuration.

Decides the few fields that heads, caches and the engine read, and how a bad `config.json` is reported. Each plugin adds its own
fields; unknown keys of a checkpoint are left alone, for configurations carry much that inference does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticSerializationError, to_json

from lorax_core.errors import CheckpointError, plain, sentence

MAX_LAYERS: Final = 10_000
"""The most layers that are read, ten times those of the deepest transformer that was published."""
MAX_LABELS: Final = 1_000_000
_COMPARE: Final = "compare it with the config.json that transformers writes for this architecture"
_SHOWN: Final = 8  # wrong fields that an error names
# Fields of `Rope` that files spell otherwise.
_ROTARY: Final = {
    "theta": "rope_theta",
    "partial": "partial_rotary_factor",
    "original_length": "original_max_position_embeddings",
}


class Problem(StrEnum):
    """What the numbers of a sequence classifier mean, as `problem_type` in a `config.json`."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


class ModelConfig(BaseModel):
    """A checkpoint's configuration, parsed once and frozen.

    `aliases` maps an architecture's own keys to the common ones (`{"n_embd": "hidden_size"}`), which win where a file has both,
    as with transformers' `attribute_map`. `own_keys` does so for keys that have no other name: the common one is not read.
    Errors name a key as the file spells it. `own_head_dim` says that heads have a size of their own, so that `hidden_size` need
    not be a multiple of their number.

    `score_tokens` are the ids whose logits score a text (`LogitScoreHead`), as sentence-transformers' files or a `config.json`
    state them.
    """

    # `protected_namespaces=()`: pydantic reserves names that begin with `model_`, and `model_type` is the key in files.
    # Python's JSON reads NaN and Infinity; a field that may hold them says so itself.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)

    aliases: ClassVar[Mapping[str, str]] = {}
    own_keys: ClassVar[Mapping[str, str]] = {}
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
    num_labels: Annotated[int, Field(ge=0, le=MAX_LABELS)] | None = None
    problem_type: Problem | None = None
    score_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=2)] | None = None

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
    def _sizes_are_of_64_bits(self, info: ValidationInfo) -> Self:
        # Larger ones torch refuses with a trace of its own, wherever a plugin uses them.
        spelt = (info.context or {}).get("spelt", {})
        for name, value in self.__dict__.items():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{spelt.get(name, name)} {value!s:.30} is larger than 64 bits hold")
        return self

    @model_validator(mode="after")
    def _heads_share_the_width(self, info: ValidationInfo) -> Self:
        if not self.own_head_dim and self.hidden_size % self.num_attention_heads:
            spelt = (info.context or {}).get("spelt", {})
            width, heads = (spelt.get(name, name) for name in ("hidden_size", "num_attention_heads"))
            raise ValueError(f"{width} {self.hidden_size} is not a multiple of {heads} {self.num_attention_heads}")
        return self

    @model_validator(mode="after")
    def _labels_are_an_answer(self) -> Self:
        # transformers refuses it, too: one class of one is always the answer.
        if self.problem_type is Problem.SINGLE_LABEL and len(self.labels) == 1:
            raise ValueError(
                "problem_type 'single_label_classification' needs more than one label; one alone is a 'regression'"
            )
        return self

    @model_validator(mode="after")
    def _score_tokens_are_of_the_vocabulary(self) -> Self:
        beyond = [token for token in self.score_tokens or () if token >= self.vocab_size]
        if beyond:
            raise ValueError(f"score_tokens names {beyond[0]}; ids are 0 to {self.vocab_size - 1}")
        return self

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Derive fields that a file leaves out, before validation; keys have their common names. A plugin overrides this."""
        return raw

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Read a `config.json`; raises CheckpointError with every field that is missing or wrong."""
        # The architecture's own key is read only where the common one is absent, and null counts as absent.
        raw = {key: value for key, value in raw.items() if key not in cls.own_keys.values()}
        own = {key: common for key, common in {**cls.aliases, **cls.own_keys}.items() if raw.get(common) is None}
        named = {**raw, **{common: raw[key] for key, common in own.items() if raw.get(key) is not None}}
        spelt = {common: key for key, common in own.items() if raw.get(key) is not None or common not in raw}
        layers = named.get("num_hidden_layers")
        # Before `normalise`, which may make a list of the layers.
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise CheckpointError(
                f"config.json has {layers} for {spelt.get('num_hidden_layers', 'num_hidden_layers')}; at most {MAX_LAYERS:,} "
                "layers are read",
                hint=_COMPARE,
            )
        try:
            normalised = to_json(dict(cls.normalise(named)))
        except (  # it read what is not there, or is of another type, or made what is no JSON
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
            PydanticSerializationError,
        ) as error:
            raise CheckpointError(
                f"config.json does not describe a {raw.get('model_type')}: {cls.__name__}.normalise failed with "
                f"{type(error).__name__}: {error}",
                hint=_COMPARE,
            ) from error
        except ValueError as error:  # what it refuses
            raise cls._refusal(raw, plain(error)) from error
        try:
            # Strict: else true and "64" would be read as numbers, and "false" as a truth value. As JSON, for a list there is
            # also a tuple, and a string a member of an enum.
            return cls.model_validate_json(normalised, strict=True, context={"spelt": spelt})
        except ValidationError as error:
            problems = [_problem(item, spelt) for item in error.errors(include_url=False)]
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise cls._refusal(raw, "; ".join([*problems[:_SHOWN], *more])) from error

    @classmethod
    def _refusal(cls, raw: Mapping[str, Any], why: str) -> CheckpointError:
        package = cls.__module__.split(".")[0]
        return CheckpointError(
            f"config.json does not describe a {raw.get('model_type')} that {package} supports: {why}", hint=_COMPARE
        )


def _problem(item: Mapping[str, Any], spelt: Mapping[str, str]) -> str:
    """One failed field, by the name that the file gives it."""
    said = sentence(item)
    names = _ROTARY if item["loc"][:1] == ("rope",) else spelt
    where = ".".join(names.get(str(step), str(step)) for step in item["loc"])
    # A whole object says less than the sentence does.
    found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r:.60})"
    return f"{where}: {said}{found}" if where else said
