"""Messages and tools of a chat request.

Decides which of OpenAI's forms are taken, and what a chat template is given of them. Knows nothing of templates.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from lorax_core.errors import shown
from lorax_core.server.errors import Refused
from lorax_core.server.schemas import StrictBody
from lorax_core.serving.requests import MESSAGES, NAME_LENGTH, PROMPT_LENGTH
from lorax_core.serving.tools import TOOLS

_Text = Annotated[str, Field(max_length=PROMPT_LENGTH)]


class TextPart(StrictBody):
    """A part of a content. There is only text: images, sounds and files are refused by name."""

    type: Literal["text"]
    text: _Text

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "unknown_parameter", "content of type {kind} is not supported, only text",
                {"kind": shown(kind), "param": "type"},
            )  # fmt: skip
        return value


class FunctionCall(StrictBody):
    """What an assistant called; `arguments` is the text of a JSON object."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH)
    arguments: _Text


class MessageToolCall(StrictBody):
    """A call of an earlier answer, as it came."""

    id: str | None = Field(default=None, max_length=NAME_LENGTH)
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(default=None, description="Accepted, and changes nothing.")


class ChatMessage(StrictBody):
    """One message. That of an assistant may have calls of tools instead of content; that of a tool answers one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = Field(default=None, max_length=NAME_LENGTH)
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = Field(default=None, max_length=NAME_LENGTH)
    reasoning_content: _Text | None = None
    reasoning: _Text | None = None
    # Empty in the answers of this server, and sent back with them.
    refusal: Literal[None, ""] = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def plain(self, param: str) -> dict[str, Any]:
        """The message for a template; raises Refused for one that has nothing in it."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        if content is None and not (self.role == "assistant" and self.tool_calls):
            raise Refused(
                "invalid", f"a message of {self.role!r} needs content", hint="add it", param=f"{param}.content"
            )
        if self.tool_calls and self.role != "assistant":
            raise Refused(
                "invalid", "only an assistant calls tools", hint="role: assistant", param=f"{param}.tool_calls"
            )
        # Templates know the older name alone.
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            found["tool_calls"] = [_call(one, f"{param}.tool_calls.{at}") for at, one in calls]
        return found


def _call(call: MessageToolCall, param: str) -> dict[str, Any]:
    """A call for a template: most want the arguments as a dict."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refused(
            "invalid", f"{shown(call.function.arguments)} is not the text of a JSON object",
            hint='arguments are written as "{\\"name\\": 1}"', param=f"{param}.function.arguments",
        )  # fmt: skip
    found = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return found if call.id is None else {"id": call.id, **found}


class FunctionTool(StrictBody):
    """What may be called. With `strict` its arguments always follow `parameters`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = Field(default=None, max_length=PROMPT_LENGTH)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(StrictBody):
    """A tool; all of them are functions."""

    type: Literal["function"]
    function: FunctionTool

    def plain(self) -> dict[str, Any]:
        """The tool as the engine takes it."""
        # Not by pydantic, which gives up on what is deeper than 255 levels.
        fields = {name: getattr(self.function, name) for name in FunctionTool.model_fields}
        return {
            "type": "function",
            "function": {name: value for name, value in fields.items() if value is not None},
        }


class NamedFunction(StrictBody):
    """Which function."""

    name: str


class NamedTool(StrictBody):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES)]
Tools = Annotated[list[ChatTool], Field(max_length=TOOLS)]
