"""Prompts of OpenAI's API: a text, token ids, or a list of either.

Decides which of these one is. Knows nothing of what is done with it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lorax_core.server.errors import Refused
from lorax_core.serving.requests import PROMPT_LENGTH

_Text = Annotated[str, Field(max_length=PROMPT_LENGTH)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(min_length=1)]
PromptInput = (
    _Text | Annotated[list[_Text], Field(min_length=1)] | _Tokens | Annotated[list[_Tokens], Field(min_length=1)]
)


def prompts(given: str | list[str] | list[int] | list[list[int]], param: str) -> list[str | list[int]]:
    """The prompts, one or several."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refused("invalid", "it is empty", hint="give a text, or a list of texts", param=param)
    if isinstance(given[0], int):
        return [[int(one) for one in given if isinstance(one, int)]]
    return [one for one in given if isinstance(one, (str, list))]
