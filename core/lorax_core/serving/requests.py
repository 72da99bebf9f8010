"""What users may ask.

Decides which options exist and which values they take: the only place where user input is validated. Knows nothing of the
model, so a limit of the model is checked where the request becomes a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorax_core.errors import RequestError, listed, nearest

TextPrompt = str | list[int] | list[dict[str, Any]]
TextInput = str | list[int] | tuple[str, str]
Truncate = Literal["error", "start", "end"]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _told(type(self), error) from error


class GenerateRequest(_Request):
    """Continue a prompt: text, token ids (taken as they are), or chat messages.

    `max_tokens` None runs to the limit of model and cache. `temperature` 0 is greedy; above, `top_k`, `top_p` and `min_p`
    narrow the choice and equal `seed`s give equal answers. `stop` strings end the text and are left out of it.
    """

    prompt: TextPrompt
    adapter: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0, strict=False)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, strict=False)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, strict=False)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    ignore_eos: bool = False

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, value: str | list[str]) -> list[str]:
        strings = [value] if isinstance(value, str) else value
        if any(not string for string in strings):
            raise ValueError("a stop string must not be empty")
        return strings


class EmbedRequest(_Request):
    """One vector for a text, a pair of texts, or token ids (taken as they are).

    `truncate` says what happens to a text that is too long: "error", or which end loses tokens ("start", "end").
    """

    input: TextInput
    adapter: str | None = None
    truncate: Truncate = "error"


class ClassifyRequest(_Request):
    """Labels for a text, a pair of texts, or token ids: of each token or of the whole, as the checkpoint was trained.

    `truncate` as in `EmbedRequest`.
    """

    input: TextInput
    adapter: str | None = None
    truncate: Truncate = "error"


Request = GenerateRequest | EmbedRequest | ClassifyRequest
_R = TypeVar("_R", GenerateRequest, EmbedRequest, ClassifyRequest)


def make_requests(
    kind: type[_R], field: str, prompts: Any, adapter: str | list[str | None] | None, options: Mapping[str, Any]
) -> tuple[list[_R], bool]:
    """Requests for one prompt or a list of them, and whether it was a single one.

    `adapter` is one name for all prompts, or a list as long as the prompts. Raises RequestError.
    """
    single = is_single(prompts)
    items = [prompts] if single else list(prompts)
    names = adapter if isinstance(adapter, list) else [adapter] * len(items)
    if len(names) != len(items):
        raise RequestError(
            f"{len(names)} adapters were named for {len(items)} prompts; name one for each, or one for all"
        )
    return [kind(**{field: item, "adapter": name, **options}) for item, name in zip(items, names, strict=True)], single


def is_single(prompts: Any) -> bool:
    """Whether `prompts` is one prompt: a text, a pair, token ids or chat messages; raises RequestError for neither."""
    if isinstance(prompts, (str, tuple)):
        return True
    if not isinstance(prompts, list):
        raise RequestError(
            f"a prompt is a text, token ids, chat messages or a pair of texts, and a list of those is a batch; "
            f"this is {type(prompts).__name__}: {prompts!r:.60}"
        )
    return bool(prompts) and all(isinstance(item, (int, dict)) for item in prompts)


def _told(kind: type[BaseModel], error: ValidationError) -> RequestError:
    told: list[str] = []
    hint = None
    for problem in error.errors():
        where = ".".join(str(step) for step in problem["loc"][:1])
        if problem["type"] == "extra_forbidden":
            told.append(f"{kind.__name__} has no option {where!r}")
            close = nearest(where, kind.model_fields)
            hint = f"did you mean {close!r}?" if close else f"options are {listed(kind.model_fields, limit=30)}"
        else:
            line = f"{where}: {problem['msg']} (found {problem['input']!r:.80})"
            if not any(existing.startswith(f"{where}: ") for existing in told):
                told.append(line)
    return RequestError("; ".join(told), hint=hint)
