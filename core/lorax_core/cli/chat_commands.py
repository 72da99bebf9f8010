"""The commands of `lorax chat`: lines that begin with a slash.

Decides which there are, how they are completed, and what they change. Knows nothing of how an answer is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import typer

import lorax_core
from lorax_core.cli.conversation import Conversation
from lorax_core.cli.options import chosen_adapter
from lorax_core.cli.render import print_message
from lorax_core.errors import RequestError, listed, nearest

BASE: Final = "base"
"""What the base is called among adapters."""

# By the names of `GenerateRequest`; a text is taken as it is.
_SETTINGS: Final[Mapping[str, Callable[[str], Any]]] = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p"), float),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), float),
    "stop": lambda text: [text],
}


@dataclass(slots=True)
class ChatState:
    """What commands change. `files` may be replaced by /save: they were read, or written, by this chat."""

    adapters: Mapping[str, str]
    adapter: str | dict[str, float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    conversation: Conversation = field(default_factory=Conversation)
    files: set[Path] = field(default_factory=set)

    @property
    def speaker(self) -> str:
        """Who answers."""
        if isinstance(self.adapter, dict):
            return ",".join(f"{name}={weight:g}" for name, weight in self.adapter.items())
        return self.adapter or BASE


def is_command(line: str) -> bool:
    """Whether a line is a command and no message; two slashes begin a message with one."""
    return line.startswith("/") and not line.startswith("//")


def run_command(state: ChatState, line: str) -> bool:
    """Does what a line says; False when the chat is to end. Raises RequestError, AdapterError or BadParameter."""
    name, _, rest = line.removeprefix("/").partition(" ")
    if name in ("quit", "exit"):
        return False
    if name not in COMMANDS:
        close = nearest(name, COMMANDS)
        hint = f"did you mean /{close}?" if close else "/help lists the commands"
        raise RequestError(f"no command is called /{name}", hint=f"{hint}; // begins a message with a slash")
    # The text of /set stop may end with spaces.
    COMMANDS[name].run(state, rest.lstrip() if name == "set" else rest.strip())
    return True


def completions(state: ChatState, before: str, word: str) -> list[str]:
    """What a word of a command may become, by the line before it."""
    words = before.split()
    if not words:
        found = [f"/{name} " if command.usage else f"/{name}" for name, command in COMMANDS.items()]
    elif words == ["/use"]:
        found = [*state.adapters, BASE]
    elif words == ["/set"]:
        found = [f"{_flag(name)} " for name in _SETTINGS]
    else:
        found = []
    return [one for one in found if one.startswith(word)]


def _use(state: ChatState, name: str) -> None:
    if not name:
        raise RequestError("/use needs a name", hint=f"there are {listed([*state.adapters, BASE])}")
    state.adapter = None if name == BASE else chosen_adapter(dict(state.adapters), name, "/adapters lists them")
    print_message(f"{state.speaker} answers", style="dim")


def _adapters(state: ChatState, _: str) -> None:
    for name in (BASE, *state.adapters):
        print_message(f"{'*' if name == state.speaker else ' '} {name}")


def _system(state: ChatState, text: str) -> None:
    state.conversation.system = text or None
    print_message("the system message is " + ("set" if text else "taken away"), style="dim")


def _set(state: ChatState, text: str) -> None:
    name, _, value = text.partition(" ")
    if not name:
        for key, one in state.options.items():
            print_message(f"{_flag(key)} {one}")
        return
    key = name.replace("-", "_")
    if key not in _SETTINGS:
        close = nearest(key, _SETTINGS)
        valid = listed(map(_flag, _SETTINGS), limit=20)
        raise RequestError(
            f"/set has no {name!r}; there are {valid}",
            hint=f"/set {_flag(close)} VALUE" if close else "/set NAME VALUE",
        )
    rest = {one: given for one, given in state.options.items() if one != key}
    if not value.strip():
        state.options = rest
        print_message(f"{name} is what it is by default", style="dim")
        return
    try:
        found = _SETTINGS[key](value if key == "stop" else value.strip())
    except ValueError as error:
        raise RequestError(f"{name} is a number, not {value.strip()!r}", hint=f"/set {name} 1") from error
    # The request says what is valid, alone and together.
    lorax_core.GenerateRequest(prompt="", **{**rest, key: found})
    state.options = {**rest, key: found}


def _save(state: ChatState, name: str) -> None:
    if not name:
        raise RequestError("/save needs the name of a file", hint="/save chat.json")
    try:
        file = Path(name).expanduser()
        foreign = file.exists() and file.resolve() not in state.files
    # RuntimeError: a user without a home; ValueError: a name that is none.
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(f"{name:.200} cannot be written: {error}", hint="/save chat.json") from error
    if foreign:
        raise RequestError(f"{file} is there already, and not of this chat", hint="give another name")
    state.conversation.save(file)
    state.files.add(file.resolve())
    print_message(f"{len(state.conversation.messages())} messages are in {file}; --history {file} goes on", style="dim")


def _undo(state: ChatState, _: str) -> None:
    if not state.conversation.turns:
        raise RequestError("nothing was said that could be taken back", hint="type a message")
    said, _answer = state.conversation.turns.pop()
    print_message(f"taken back: {said}", style="dim")


def _clear(state: ChatState, _: str) -> None:
    state.conversation.turns.clear()
    print_message("all is taken back but the system message", style="dim")


def _help(_: ChatState, __: str) -> None:
    width = max(len(f"/{name} {command.usage}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        print_message(f"{f'/{name} {command.usage}'.ljust(width)}  {command.help}")
    print_message(
        'A backslash ends a line that goes on, and """ stands around several. Ctrl-C ends an answer, Ctrl-D all.'
    )


def _quit(_: ChatState, __: str) -> None:
    """`run_command` does it."""


@dataclass(frozen=True, slots=True)
class ChatCommand:
    """A command, what stands behind it, and what it does."""

    usage: str
    help: str
    run: Callable[[ChatState, str], None]


COMMANDS: Final[Mapping[str, ChatCommand]] = {
    "use": ChatCommand("NAME", f"Who answers: an adapter, a sum a=0.7,b=0.3, or {BASE}.", _use),
    "adapters": ChatCommand("", "The adapters; * answers.", _adapters),
    "system": ChatCommand("TEXT", "The system message, before all others; without TEXT there is none.", _system),
    "set": ChatCommand("NAME VALUE", "A sampling option, such as temperature 0.7; no value is the default.", _set),
    "undo": ChatCommand("", "Take back the last message and its answer.", _undo),
    "clear": ChatCommand("", "Take back all messages.", _clear),
    "save": ChatCommand("FILE", "Write the messages as JSON, which --history reads.", _save),
    "help": ChatCommand("", "This list.", _help),
    "quit": ChatCommand("", "End the chat.", _quit),
}


def _flag(name: str) -> str:
    return name.replace("_", "-")


def wrong_usage(error: typer.BadParameter) -> RequestError:
    """A wrong command line that is typed into a chat, which it does not end."""
    found = RequestError(error.message, hint="/help says how commands are written")
    found.__cause__ = error
    return found
