"""Who answers in `lorax chat`: an engine of this process, or a running server.

Decides what a conversation needs of either, and how a request is cut to the room that is left. Knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import lorax_core
from lorax_core.errors import RequestError, listed
from lorax_core.types import FinishReason

if TYPE_CHECKING:
    from lorax_core.cli.served import Server
    from lorax_core.serving.engine import Engine


class AnswerEvent(Protocol):
    """A piece of an answer; the last has why it ended."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...


class Answering(Protocol):
    """What answers requests, with a prompt of messages or of text."""

    def check(self, request: lorax_core.GenerateRequest) -> None:
        """Raises RequestError when conversations cannot be answered, as far as that is known beforehand."""

    def stream(self, request: lorax_core.GenerateRequest) -> AbstractContextManager[Iterable[AnswerEvent]]:
        """The answer as it comes; leaving the block ends it. Raises RequestError, as the pieces may."""


class EngineAnswers:
    """An engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def check(self, request: lorax_core.GenerateRequest) -> None:
        """The model may generate nothing, or have no chat template."""
        if "generate" not in (tasks := self._engine.info().tasks):
            raise RequestError(
                f"this model does not generate text; its tasks are {listed(tasks)}",
                hint="lorax models check PATH shows what a checkpoint is for; lorax embed and lorax classify ask others",
            )
        try:
            self._engine.count_tokens(request.prompt, adapter=request.adapter)
        except RequestError as error:
            hint = "--plain joins the messages as text; lorax generate continues a text"
            raise RequestError(error.message, hint=hint) from error

    def stream(self, request: lorax_core.GenerateRequest) -> AbstractContextManager[Iterable[AnswerEvent]]:
        """`max_tokens` is cut to the room that is left."""
        tokens = self._engine.count_tokens(request.prompt, adapter=request.adapter)
        room = self._engine.info().max_tokens - tokens
        if room < 1:
            raise RequestError(
                f"the conversation has {tokens:,} tokens, and the model reads {room + tokens:,}",
                hint="/undo takes back the last message, /clear all of them",
            )
        if request.max_tokens is not None and request.max_tokens > room:
            request = request.model_copy(update={"max_tokens": room})
        return self._engine.stream(**request.model_dump())


class ServerAnswers:
    """A running server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def check(self, request: lorax_core.GenerateRequest) -> None:
        """Only an answer tells."""

    def stream(self, request: lorax_core.GenerateRequest) -> AbstractContextManager[Iterable[AnswerEvent]]:
        """The server says what it has no room for."""
        return contextlib.closing(self._server.stream(request))
