"""Conversations as text, by the chat template of a checkpoint.

Decides what a template is given, and that tools which it does not know are refused instead of dropped. Knows nothing of
token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lorax_core.errors import RequestError, shown
from lorax_core.untrusted import guarded

CONTINUE: Final = "continue_final_message"
_STRING: Final = "give the prompt as one string"


class ChatWriter:
    """The templates of one tokenizer, each compiled when first used. Safe to call from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, Any] = {}  # two threads that compile one at once get the same

    def text(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Mapping[str, Any]
    ) -> str:
        """A conversation up to where the answer begins; raises RequestError where the template refuses it."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("this checkpoint has no chat template", hint=_STRING)
        with guarded(RequestError, f"the chat template refused {shown(messages, 120)}", hint=_STRING):
            text = self._rendered(messages, tools, options)
            text.encode()  # half a pair of surrogates, which a template can write, is no text
            if tools and text == self._rendered(messages, None, options):
                raise RequestError(
                    "the chat template of this checkpoint shows no tools to the model",
                    hint="leave tools out, or serve a checkpoint that was trained to call them",
                )
        return text

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Mapping[str, Any]
    ) -> str:
        # Late: most checkpoints have no template, and jinja is no small import.
        from lorax_core.serving.templates import ChatTemplate

        source = self._tokenizer.get_chat_template(tools=tools)
        template = self._templates.get(source)
        if template is None:
            template = self._templates[source] = ChatTemplate(source)
        variables = {name: value for name, value in options.items() if name != CONTINUE}
        if options.get(CONTINUE):
            variables["add_generation_prompt"] = False
        special = self._tokenizer.special_tokens_map
        variables["tools"] = [_shown_tool(one) for one in tools] if tools else None
        try:
            text: str = template.render(messages, special, variables)
        except TypeError:
            # Some write the arguments of calls out as they are, so want their text.
            spelt = [_with_text_arguments(one) for one in messages]
            if spelt == messages:
                raise
            text = template.render(spelt, special, variables)
        return _up_to_last(text, messages[-1]) if options.get(CONTINUE) else text


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as models have seen some: whether its schema is enforced is nothing for them."""
    return {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message in which the arguments of calls are the text of JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message

    def spelt(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return {**message, "tool_calls": [spelt(call) for call in calls]}


def _up_to_last(text: str, message: Mapping[str, Any]) -> str:
    """A conversation without what the template writes after the content of its last message, as transformers cuts it."""
    content = message.get("content")
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("text")
    wanted = content.strip() if isinstance(content, str) else ""
    at = text.rfind(wanted) if wanted else -1
    if at < 0:
        raise RequestError(
            f"{CONTINUE}: the last message has no text that the template writes", hint="leave it out, or add text to it"
        )
    assert isinstance(content, str)
    # Blanks at its end are kept where the template keeps them.
    whole = content.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else wanted)]
