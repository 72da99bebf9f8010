"""A conversation: what was said and answered, in files too.

Decides what is taken back, what a file of messages may hold, and how messages are joined for a model without a chat template.
Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lorax_core.cli.resuming import write_new
from lorax_core.errors import RequestError, shown
from lorax_core.untrusted import read_json

_FORM: Final = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], as /save writes it'
PLAIN_STOP: Final = "\nUser:"
"""Where an answer to messages that were joined as text ends."""


@dataclass(slots=True)
class Conversation:
    """Turns, each a message and its answer, below a system message or none."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, said: str | None = None) -> list[dict[str, Any]]:
        """All messages, and one more that is not answered yet."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for message, answer in self.turns:
            found += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        return found if said is None else [*found, {"role": "user", "content": said}]

    def plain(self, said: str) -> str:
        """All messages as one text that a model continues with its answer."""
        turns = [f"User: {message}\nAssistant:{_spaced(answer)}\n" for message, answer in self.turns]
        return "".join([*([f"{self.system}\n\n"] if self.system else []), *turns, f"User: {said}\nAssistant:"])

    def save(self, file: Path) -> None:
        """Writes the messages as JSON; the file is there whole, or as it was."""
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            write_new(part, json.dumps(self.messages(), indent=2, ensure_ascii=False) + "\n")
            part.replace(file)
        except (OSError, ValueError) as error:
            # What cannot be written may not be deleted either.
            with contextlib.suppress(OSError, ValueError):
                part.unlink()
            raise RequestError(f"{file} cannot be written: {error}", hint="/save FILE, where you may write") from error


def read_conversation(file: Path) -> Conversation:
    """The conversation in a file. Raises RequestError for what is none."""
    found = read_json(file, RequestError)
    if not isinstance(found, list):
        raise RequestError(f"{file} holds no list of messages: {shown(found, 60)}", hint=_FORM)
    conversation, waiting = Conversation(), None
    for at, message in enumerate(found):
        role, content = _parts(file, at, message)
        if role == "system" and at == 0:
            conversation.system = content
        elif role == "user" and waiting is None:
            waiting = content
        elif role == "assistant" and waiting is not None:
            conversation.turns.append((waiting, content))
            waiting = None
        else:
            raise RequestError(f"{file}: message {at} of {role!r} is out of turn", hint=_FORM)
    if waiting is not None:
        raise RequestError(f"{file}: the last message has no answer", hint=_FORM)
    return conversation


def _parts(file: Path, at: int, message: Any) -> tuple[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise RequestError(f"{file}: message {at} is {shown(message, 60)}", hint=_FORM)
    return role, content


def _spaced(answer: str) -> str:
    """An answer as it stood behind its colon."""
    return answer if answer[:1].isspace() else f" {answer}"
