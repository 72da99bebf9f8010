"""What OpenAI's two generating routes take in common.

Decides how each parameter, of OpenAI or vLLM, becomes an option of `GenerateRequest`, and which are refused by name. Knows
nothing of prompts or messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from lorax_core.errors import RequestError
from lorax_core.server.errors import Refused
from lorax_core.server.options import ServerOptions
from lorax_core.server.schemas import StrictBody, check_size, unsupported
from lorax_core.serving.requests import (
    CHOICES,
    CONSTRAINT_LENGTH,
    NAME_LENGTH,
    STOP_LENGTH,
    STOP_STRINGS,
    TOKEN_OPTIONS,
    GenerateRequest,
)

MODEL: Final = "The base, an adapter, or base:adapter; left out, the base."
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
_Schema = dict[str, Any] | str
_NOTHING: Final = "Accepted, and changes nothing."


class StreamOptions(StrictBody):
    """What comes in a stream beside the answer."""

    include_usage: bool | None = Field(default=None, description="End with a chunk that has the usage of all.")
    include_obfuscation: Any = unsupported(False)
    continuous_usage_stats: Any = unsupported(False)


class JsonSchemaFormat(StrictBody):
    """A schema that the answer follows, whether or not it is `strict`."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
    """What the text of an answer is: anything, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(StrictBody):
    """vLLM's form of constraints: one of these."""

    json_: _Schema | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, max_length=CONSTRAINT_LENGTH)
    choice: list[str] | None = Field(default=None, min_length=1, max_length=CHOICES)
    json_object: bool | None = None
    grammar: Any = unsupported()
    structural_tag: Any = unsupported()


class GenerationBody(StrictBody):
    """Parameters of OpenAI, then those of vLLM. Null is as if left out."""

    model: str | None = Field(default=None, max_length=NAME_LENGTH, description=MODEL)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[_TokenId, _Bias] | None = Field(default=None, max_length=TOKEN_OPTIONS)
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 is greedy; left out, 1.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, description=_NOTHING)
    metadata: dict[str, Any] | None = Field(default=None, description=_NOTHING)

    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="0 and -1 switch it off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=TOKEN_OPTIONS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=100)
    priority: int | None = Field(default=None, ge=-100, le=100, description="The lowest is answered first, as in vLLM.")
    guided_json: _Schema | None = None
    guided_regex: str | None = Field(default=None, max_length=CONSTRAINT_LENGTH)
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=CHOICES)
    structured_outputs: StructuredOutputs | None = None

    guided_grammar: Any = unsupported()
    use_beam_search: Any = unsupported(False)
    length_penalty: Any = unsupported(1)
    include_stop_str_in_output: Any = unsupported(False)
    skip_special_tokens: Any = unsupported(True)
    spaces_between_special_tokens: Any = unsupported(True)
    truncate_prompt_tokens: Any = unsupported()
    allowed_token_ids: Any = unsupported()
    bad_words: Any = unsupported([])
    logits_processors: Any = unsupported()
    return_token_ids: Any = unsupported(False)
    return_tokens_as_token_ids: Any = unsupported(False)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Raises Refused for what does not fit together."""
        if self.stream_options is not None and not self.stream:
            raise Refused("invalid", "stream_options without stream", hint='add "stream": true', param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise Refused(
                "invalid", "prompt_logprobs do not come in streams", hint="ask without stream", param="prompt_logprobs"
            )

    def options(self, limits: ServerOptions) -> dict[str, Any]:
        """Options of `GenerateRequest`, all but the prompt, logprobs and what is about chat."""
        found = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        # OpenAI's default, where the engine's own is greedy.
        found.setdefault("temperature", 1.0)
        if self.top_k is not None and self.top_k > 0:
            found["top_k"] = self.top_k
        if self.logit_bias:
            found["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if self.priority:
            found["priority"] = -self.priority
        return found | self._constraint(limits)

    def _constraint(self, limits: ServerOptions) -> dict[str, Any]:
        """The one option by which the answer is constrained."""
        found = self.constraints()
        if len(found) > 1:
            raise Refused(
                "invalid", f"{' and '.join(found)} exclude each other", hint="give one of them", param=[*found][-1]
            )
        for param, constraint in found.items():
            for value in constraint.values():
                check_size(value, limits, param)
            return constraint
        return {}

    def constraints(self) -> dict[str, dict[str, Any]]:
        """What constrains the answer, by parameter."""
        outputs, given = self.structured_outputs or StructuredOutputs(), self.response_format
        found: dict[str, dict[str, Any]] = {}
        if given is not None and given.type == "json_object":
            found["response_format"] = {"json_schema": {"type": "object"}}
        elif given is not None and given.type == "json_schema":
            if given.json_schema is None:
                raise Refused(
                    "invalid", "a response_format of this type needs json_schema",
                    hint='{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
                    param="response_format.json_schema",
                )  # fmt: skip
            found["response_format"] = {"json_schema": given.json_schema.schema_ or {"type": "object"}}
        for param, option, value in (
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("structured_outputs.json", "json_schema", outputs.json_),
            ("structured_outputs.regex", "regex", outputs.regex),
            ("structured_outputs.choice", "choice", outputs.choice),
            ("structured_outputs.json_object", "json_schema", {"type": "object"} if outputs.json_object else None),
        ):
            if value is not None:
                found[param] = {option: value}
        return found


_SAME: Final = (
    "frequency_penalty", "presence_penalty", "n", "seed", "stop", "temperature", "top_p", "min_p", "typical_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs",
)  # fmt: skip
"""Parameters that are called the same in `GenerateRequest`."""


def generate_request(body: GenerationBody, **options: Any) -> GenerateRequest:
    """A request to the engine; raises Refused that names the parameter of `body` which is wrong."""
    try:
        return GenerateRequest(**options)
    except RequestError as error:
        param = error.option if error.option in type(body).model_fields else _CHAT.get(error.option or "")
        said = error.message.removeprefix(f"{error.option}: ")
        raise Refused("invalid", said, hint=error.http_hint, param=param) from error


_CHAT: Final = {"prompt": "messages", "template_options": "chat_template_kwargs"}
"""What a conversation has for options of `GenerateRequest` that are called otherwise."""
