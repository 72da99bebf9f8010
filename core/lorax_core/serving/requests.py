"""The requests that users make.

Decides which options exist, which values they take and how large they may be: the only place where user input is validated.
Knows nothing of the model, so a limit of the model is checked where the request becomes a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from lorax_core.errors import RequestError, WrongOption, listed, shown
from lorax_core.options import Checked
from lorax_core.serving.tools import check_tools, names_of

PROMPT_LENGTH: Final = 4 * 2**20
"""Characters of the longest prompt or conversation, about four times the tokens of the longest contexts."""
MESSAGES: Final = 10_000
STOP_STRINGS: Final = 128
STOP_LENGTH: Final = 4_096
"""Characters of all stop strings together: each new piece of text is compared with all of them."""
TOKEN_OPTIONS: Final = 4_096
"""Entries of `logit_bias` and `stop_token_ids`, which every step looks at."""
CHOICES: Final = 10_000
CONSTRAINT_LENGTH: Final = 256 * 1024
"""Characters of a regular expression, or of all choices together."""
TEMPLATE_OPTIONS: Final = 64
NAME_LENGTH: Final = 4_096
SUMMANDS: Final = 64
"""Adapters of one weighted sum."""

TextPrompt = str | list[int] | list[dict[str, Any]]
TextInput = str | list[int] | tuple[str, str]
Truncate = Literal["error", "start", "end"]
_Name = Annotated[str, Field(max_length=NAME_LENGTH)]
_Weight = Annotated[float, Field(allow_inf_nan=False)]
AdapterChoice = _Name | Annotated[dict[_Name, _Weight], Field(max_length=SUMMANDS)] | None
"""An adapter's name, or several names with weights for their weighted sum. None is the base."""


class GenerateRequest(Checked):
    """Continue a prompt: a string, token ids (taken as they are), or chat messages.

    - `max_tokens` None runs to the limit of model and cache; nothing ends the completion before `min_tokens`.
    - `truncate_prompt_tokens` keeps so many of the prompt's last tokens, counting special ones, which stay.
    - `temperature` 0 is greedy; above, `top_k`, `top_p`, `min_p` and `typical_p` filter the candidates, in this order, and
      equal `seed`s give equal answers. `n` answers are sampled independently.
    - `repetition_penalty` divides the logits of all tokens before; `presence_penalty` and `frequency_penalty` lower those of
      generated ones, as OpenAI's do; `logit_bias` adds to logits by token id.
    - `stop` strings and `stop_token_ids` end the completion and are left out of it; so do end tokens, unless `ignore_eos`.
    - `logprobs` and `prompt_logprobs` ask for the model's own log-probabilities and this many of the most likely tokens.
    - `json_schema`, `regex` or `choice` constrain the completion (the extra `lorax-core[structured]`).
    - `tools`, in OpenAI's form, are shown to the model by the chat template, which also sees `template_options`, transformers'
      `add_generation_prompt` and `continue_final_message` among them. With `tool_choice` "required", or a tool's name, the
      completion is calls, else any text in which there may be some; `parallel_tool_calls` False ends it after the first.
    - `priority` moves a request forward in the queue.
    """

    prompt: TextPrompt
    adapter: AdapterChoice = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    # The ranges of presence and frequency penalty, logit_bias and n are OpenAI's.
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    typical_p: float = Field(default=1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=100.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=TOKEN_OPTIONS
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    n: int = Field(default=1, ge=1, le=128)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=TOKEN_OPTIONS)
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=100)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=100)
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = Field(default=None, max_length=CONSTRAINT_LENGTH)
    choice: list[str] | None = Field(default=None, min_length=1, max_length=CHOICES)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    template_options: dict[str, Any] = Field(default_factory=dict, max_length=TEMPLATE_OPTIONS)
    priority: int = Field(default=0, ge=-100, le=100)

    @field_validator("stop", mode="before")
    @classmethod
    def _no_stop(cls, value: Any) -> Any:
        return [] if value is None else value  # as OpenAI's clients send it

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _keys_of_json(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # JSON has text for keys, so OpenAI's clients send ids as text.
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: one for key, one in value.items()}

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, value: str | list[str]) -> list[str]:
        # An empty string is found at once in any text.
        strings = [value] if isinstance(value, str) else value
        if any(not string for string in strings):
            raise ValueError("a stop string must not be empty")
        if len(strings) > STOP_STRINGS or sum(map(len, strings)) > STOP_LENGTH:
            raise ValueError(f"at most {STOP_STRINGS} stop strings, of {STOP_LENGTH:,} characters together")
        return strings

    @field_validator("choice")
    @classmethod
    def _short_choices(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and sum(map(len, value)) > CONSTRAINT_LENGTH:
            raise ValueError(f"at most {CONSTRAINT_LENGTH:,} characters in all choices together")
        return value

    @field_validator("prompt")
    @classmethod
    def _plain_prompt(cls, value: TextPrompt) -> TextPrompt:
        _check_length(value)
        return value

    @field_validator("tools")
    @classmethod
    def _plain_tools(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if value is not None:
            _check_length(value)
            check_tools(value)
        return value

    @field_validator("template_options")
    @classmethod
    def _plain_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_length(value)
        if own := {"messages", "tools"} & value.keys():
            raise ValueError(f"{min(own)!r} has an option of its own, and is none of the template's")
        if value.get("continue_final_message") and value.get("add_generation_prompt"):
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if sum(one is not None for one in (self.json_schema, self.regex, self.choice)) > 1:
            raise ValueError("json_schema, regex and choice exclude each other")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise WrongOption("min_tokens", f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        self._check_chat()
        return self

    def _check_chat(self) -> None:
        chat = isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)
        if (self.tools or self.template_options) and not chat:
            raise ValueError("tools and template_options need a prompt of chat messages")
        names = names_of(self.tools or [])
        if self.tool_choice != "auto" and not (names if self.tool_choice == "required" else self.tool_choice in names):
            raise WrongOption("tool_choice", f"tool_choice is 'auto', 'required' or one of the tools, {listed(names)}")
        if self.tools and (self.regex is not None or self.choice is not None):
            raise ValueError("regex and choice leave no room for calls of tools; json_schema does")


class EmbedRequest(Checked):
    """One vector for a string, a pair of strings, or token ids (taken as they are). None leaves an option to the checkpoint.

    - `truncate` says what happens to an input that is too long: "error", or which end loses tokens ("start", "end").
    - `pooling` makes one vector of the rows of all tokens; "none" gives these rows, as the last layer left them: without the
      checkpoint's dense layers, and of unit length only where `normalize` is True.
    - `dimensions` keeps the first so many numbers (Matryoshka); then vectors that are normalised are normalised again.
    - `prompt_name` names a prompt of the checkpoint, and `prompt` is one itself: it is put before the text, instead of the
      checkpoint's default.
    """

    input: TextInput
    adapter: AdapterChoice = None
    truncate: Truncate = "error"
    pooling: Literal["cls", "mean", "last", "none"] | None = None
    normalize: bool | None = None
    dimensions: int | None = Field(default=None, ge=1, lt=2**31)
    prompt_name: _Name | None = None
    prompt: str | None = None

    @field_validator("input", "prompt")
    @classmethod
    def _plain_input(cls, value: Any) -> Any:
        _check_length(value)
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.prompt_name is not None and self.prompt is not None:
            raise WrongOption("prompt_name", "prompt_name and prompt exclude each other")
        if isinstance(self.input, list) and (self.prompt_name is not None or self.prompt is not None):
            option = "prompt" if self.prompt_name is None else "prompt_name"
            raise WrongOption(option, "a prompt goes before a text, and token ids are taken as they are")
        return self


class ClassifyRequest(Checked):
    """Labels for a string, a pair of strings, or token ids: of each token or of the whole, as the checkpoint was trained.

    Scores are probabilities, or logits with `raw_scores`. `truncate` as in `EmbedRequest`.
    """

    input: TextInput
    adapter: AdapterChoice = None
    truncate: Truncate = "error"
    raw_scores: bool = False

    @field_validator("input")
    @classmethod
    def _plain_input(cls, value: TextInput) -> TextInput:
        _check_length(value)
        return value


class RerankRequest(Checked):
    """How well a document answers a query, by a head with one label.

    The score is the sigmoid of the head's logit, from 0 to 1, whatever activation the checkpoint names; with `normalize` False
    the logit itself. `truncate` as in `EmbedRequest`: of a pair, the longer text loses tokens first.
    """

    query: str
    document: str
    adapter: AdapterChoice = None
    truncate: Truncate = "error"
    normalize: bool = True

    @field_validator("query", "document")
    @classmethod
    def _plain_text(cls, value: str) -> str:
        _check_length(value)
        return value


def _check_length(value: Any) -> None:
    """Refuse a prompt that is too long, and chat messages that hold what JSON does not."""
    if isinstance(value, list) and len(value) > MESSAGES and isinstance(value[0], dict):
        raise ValueError(f"at most {MESSAGES:,} chat messages")
    length, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, (dict, list, tuple)):
            # Token ids were checked to be such, and may be many.
            if not (isinstance(item, list) and item and type(item[0]) is int and item is value):
                left += [*item, *item.values()] if isinstance(item, dict) else item
            length += len(item)
        elif isinstance(item, str):
            length += len(item)
        elif item is not None and not isinstance(item, (bool, int, float)):
            raise ValueError(f"text, numbers, lists and dicts are what it is made of, and not {shown(item, 60)}")
        if length > PROMPT_LENGTH:
            raise ValueError(f"at most {PROMPT_LENGTH:,} characters")


Request = GenerateRequest | EmbedRequest | ClassifyRequest | RerankRequest
AdapterChoices = AdapterChoice | Sequence[AdapterChoice]
_R = TypeVar("_R", GenerateRequest, EmbedRequest, ClassifyRequest)


def make_requests(
    kind: type[_R], field: str, prompts: Any, adapter: AdapterChoices, options: Mapping[str, Any]
) -> tuple[list[_R], bool]:
    """Requests for one prompt or a list of them, and whether it was a single one.

    `adapter` is one choice for all prompts, or a list as long as the prompts. Raises RequestError.
    """
    single = is_single(prompts)
    items = [prompts] if single else list(prompts)
    if adapter is None or isinstance(adapter, (str, Mapping)):
        names: list[Any] = [adapter] * len(items)
    elif isinstance(adapter, (list, tuple)):
        names = list(adapter)
    else:
        raise RequestError(
            f"adapter: a name, a dict of names with weights, or a list of those, not {shown(adapter)}",
            hint="engine.adapters.list() gives the names",
        )
    if len(names) != len(items):
        raise RequestError(
            f"{len(names)} adapters were named for {len(items)} prompts; name one for each, or one for all",
            hint="None in the list stands for the base",
        )
    return [kind(**{field: item, "adapter": name, **options}) for item, name in zip(items, names, strict=True)], single


def is_single(prompts: Any) -> bool:
    """Whether `prompts` is one prompt (a string, a pair, token ids or chat messages) and not a list of them."""
    # A tuple is a pair of texts, a list several of them; that is how the two differ.
    if isinstance(prompts, (str, tuple)):
        return True
    if not isinstance(prompts, list):
        raise RequestError(
            f"a prompt is a string, token ids, chat messages or a pair of strings, and a list of those is a batch; "
            f"this is {type(prompts).__name__}: {shown(prompts, 60)}",
            hint="engine.generate('text'), or engine.generate(['text', 'another'])",
        )
    return bool(prompts) and all(isinstance(item, (int, dict)) for item in prompts)
