"""What LoRAX's clients send, and the requests that it means.

Decides for each parameter what honours it, and refuses by name what nothing honours. Knows nothing of answers.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Gateway
from lorax_core.server.lorax.adapters import AdapterParameters, choose_adapter, shown_adapter
from lorax_core.server.schemas import StrictBody, check_size, unsupported
from lorax_core.serving.requests import STOP_STRINGS, GenerateRequest

BEST_OF: Final = 128
"""The most answers of which the best is given."""
_PATH: Final = "parameters"
_OBJECT: Final = {"type": "object"}


class AnswerFormat(StrictBody):
    """What an answer must be. The type "json_object" without a schema is any JSON object."""

    type: Literal["json_object", "json_schema", "text"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class GenerateParameters(AdapterParameters):
    """How to answer. What is left out is LoRAX's default: greedy, without details, to the limit of the model."""

    best_of: int | None = Field(
        default=None, ge=1, le=BEST_OF, description="Sample this many; return the most likely one."
    )
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 is greedy; others than 1 sample.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    top_k: int | None = Field(default=None, ge=1, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    do_sample: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    ignore_eos_token: bool = False
    return_full_text: bool | None = Field(default=None, description="Put the prompt before the answer.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=STOP_STRINGS, description="Left out of the answer, which one of them ends."
    )
    truncate: int | None = Field(default=None, ge=1, lt=2**31, description="Keep so many of the prompt's last tokens.")
    watermark: Any = unsupported(False)
    details: bool = False
    decoder_input_details: bool = Field(default=False, description="Details with the prompt's tokens; not in streams.")
    return_k_alternatives: int | None = Field(default=None, ge=1, le=100, description="Needs details.")
    apply_chat_template: Any = unsupported(False, instead="send messages to /v1/chat/completions")
    seed: int | None = Field(default=None, ge=0, lt=2**64, description="Not with best_of.")
    response_format: AnswerFormat | None = None

    @property
    def samples(self) -> bool:
        """Whether answers are sampled: asked for, or any of the options is set that only sampling reads."""
        if self.temperature == 0:
            return False
        warped = (
            self.temperature not in (None, 1.0) or self.top_p not in (None, 1.0) or self.typical_p not in (None, 1.0)
        )
        return self.do_sample or warped or self.top_k is not None

    @property
    def with_details(self) -> bool:
        """Whether the answer has details."""
        return self.details or self.decoder_input_details


class GenerateBody(StrictBody):
    """A prompt, and how to answer it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": "The sky is", "parameters": {"max_new_tokens": 8, "details": True}}]}
    )

    inputs: str = Field(min_length=1)
    parameters: GenerateParameters | None = None
    stream: bool = Field(default=False, description="Server-sent events, one for each token; at / alone.")

    @property
    def asked(self) -> GenerateParameters:
        """Its parameters."""
        return self.parameters or GenerateParameters()


@dataclass(frozen=True)
class Asked:
    """What one body asks for: requests, of which the best is the answer, and what answers and headers say of them."""

    prompt: str
    parameters: GenerateParameters
    requests: list[GenerateRequest]
    adapter: tuple[str, str] | None
    """Its id as the client gave it, and its source."""


def asked_of(gateway: Gateway, body: GenerateBody, *, stream: bool) -> Asked:
    """The requests of a body; raises Refused for what is not honoured, naming the parameter."""
    parameters = body.asked
    _check(parameters, stream=stream)
    adapter = choose_adapter(gateway, parameters)
    options = _options(parameters, stream=stream)
    if (schema := _schema(gateway, parameters)) is not None:
        options["json_schema"] = schema
    # Not one request for n answers: each has a seed of its own, with which a client gets that answer alone.
    requests = [
        GenerateRequest(prompt=body.inputs, adapter=adapter, seed=_seed(parameters), **options)
        for _ in range(parameters.best_of or 1)
    ]
    return Asked(body.inputs, parameters, requests, shown_adapter(parameters))


def _seed(parameters: GenerateParameters) -> int | None:
    """The client's, or a new one that the answer tells; none where nothing is sampled."""
    if not parameters.samples:
        return None
    return parameters.seed if parameters.seed is not None else secrets.randbits(63)


def _options(parameters: GenerateParameters, *, stream: bool) -> dict[str, Any]:
    needs_logprobs = stream or parameters.with_details or (parameters.best_of or 1) > 1
    found: dict[str, Any] = {
        # The filters change nothing where the most likely token is taken.
        "temperature": (1.0 if parameters.temperature is None else parameters.temperature)
        if parameters.samples
        else 0.0,
        "max_tokens": parameters.max_new_tokens,
        "ignore_eos": parameters.ignore_eos_token,
        "stop": parameters.stop,
        "truncate_prompt_tokens": parameters.truncate,
        "top_k": parameters.top_k,
        "logprobs": (parameters.return_k_alternatives or 0) if needs_logprobs else None,
        "prompt_logprobs": 0 if parameters.decoder_input_details else None,
    }
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty", "top_p", "typical_p"):
        if (value := getattr(parameters, name)) is not None:
            found[name] = value
    return found


def _check(parameters: GenerateParameters, *, stream: bool) -> None:
    if (parameters.best_of or 1) > 1:
        if stream:
            raise _refused("best_of", "a stream has one answer", "leave it out, or do not stream")
        if not parameters.samples:
            raise _refused("best_of", "greedy answers are all the same", "set do_sample, and no temperature of 0")
        if parameters.seed is not None:
            raise _refused("seed", "best_of gives each answer a seed of its own", "leave one of the two out")
    if stream and parameters.decoder_input_details:
        raise _refused("decoder_input_details", "a stream has no place for the prompt's tokens", "do not stream")
    if parameters.return_k_alternatives is not None and not (stream or parameters.with_details):
        raise _refused("return_k_alternatives", "only details show tokens", "set details")


def _schema(gateway: Gateway, parameters: GenerateParameters) -> dict[str, Any] | None:
    """The JSON schema that the answer must fit."""
    form = parameters.response_format
    if form is None or (form.type == "text" and form.schema_ is None):
        return None
    if form.type == "text":
        raise _refused("response_format.schema", "text has no schema", 'leave it out, or say "json_schema"')
    if form.type == "json_schema" and form.schema_ is None:
        raise _refused("response_format.schema", "a schema is needed", '"json_object" does without')
    found = _OBJECT if form.schema_ is None else form.schema_
    check_size(found, gateway.options, f"{_PATH}.response_format.schema")
    return found


def _refused(name: str, why: str, hint: str) -> Refused:
    return Refused("invalid", why, hint=hint, param=f"{_PATH}.{name}")
