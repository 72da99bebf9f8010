"""`lorax chat`: a conversation with a model, at a terminal or through a pipe.

Decides how turns go, what an interruption ends, and what is shown when a conversation cannot go on. Knows nothing of models:
loading and answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Self

import typer

import lorax_core
from lorax_core.cli.answering import AnswerEvent, Answering, EngineAnswers, ServerAnswers
from lorax_core.cli.batches import as_text
from lorax_core.cli.chat_commands import ChatState, completions, is_command, run_command, wrong_usage
from lorax_core.cli.completions import show_text
from lorax_core.cli.conversation import PLAIN_STOP, read_conversation
from lorax_core.cli.hints import at_command_line
from lorax_core.cli.lines import Lines, PipedLines, TypedLines, read_message
from lorax_core.cli.loading import Loading, ModelOrServer, loads_model
from lorax_core.cli.options import UseAdapter
from lorax_core.cli.render import print_error, print_message, printable
from lorax_core.cli.sampling import samples
from lorax_core.cli.served import Server
from lorax_core.cli.streams import OutputError, check_stdin
from lorax_core.errors import LoraxError
from lorax_core.types import FinishReason

app = typer.Typer(add_completion=False)


@app.command()
@loads_model
@samples
def chat(
    context: typer.Context,
    path: ModelOrServer,
    use: UseAdapter = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message, before all others.")] = None,
    history: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on with a conversation, as /save writes it.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Join the messages as text, for a model without a chat template.")
    ] = False,
    *,
    sampling: dict[str, Any],
    loading: Loading,
) -> None:
    """Talk with a model; answers stream to stdout.

    /help lists what can be typed beside messages: /use switches adapters. In a pipe each line is a message. A MODEL such as
    http://localhost:8000 is a server with OpenAI's API, which answers; its key is the first of LORAX_API_KEYS.
    """
    server = loading.server(path)
    state = ChatState(_adapters_of(loading, path, server), options=sampling)
    if server is not None:
        state.adapter = server.chosen(use)
    # One among several need not be named here: /use names it.
    elif use is not None or len(loading.options.get("adapters", {})) < 2:
        state.adapter = loading.chosen_adapter(path, use)
    if history is not None:
        state.conversation = read_conversation(history)
        state.files.add(history.resolve())
    if system is not None:
        state.conversation.system = as_text(system, "--system")
    # What is wrong with the options is known before anything is loaded.
    lorax_core.GenerateRequest(prompt="", **sampling)
    check_stdin()
    with _answering(loading, path, server) as answering:
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        talk = Talk(answering, state, plain=plain, at_terminal=at_terminal)
        talk.check()
        if at_terminal:
            print_message(f"{path}: {state.speaker} answers; /help lists commands, Ctrl-D ends", style="dim")
            debug = bool(context.find_root().params.get("debug"))
            _at_terminal(talk, TypedLines(functools.partial(completions, state)), debug=debug)
        else:
            _through_pipe(talk, PipedLines())


def _adapters_of(loading: Loading, path: str, server: Server | None) -> dict[str, str]:
    """The adapters that /use may name, with where they come from."""
    if server is not None:
        return dict.fromkeys(server.adapters, server.url)
    found: dict[str, str] = loading.options_of(path)["adapters"]
    return found


@contextlib.contextmanager
def _answering(loading: Loading, path: str, server: Server | None) -> Iterator[Answering]:
    if server is not None:
        yield ServerAnswers(server)
        return
    with loading.engine(path) as engine:
        yield EngineAnswers(engine)


class _Interruption:
    """Ctrl-C while an answer streams: it ends waiting, and comes after a write and not within it, which would lose stdout."""

    def __init__(self) -> None:
        self._held = self._came = False
        # In the background a shell may have it ignored.
        self._possible = signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def __enter__(self) -> Self:
        if self._possible:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._possible:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing within is interrupted; KeyboardInterrupt is raised at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._came = True


class Talk:
    """A conversation. `plain` joins messages as text; at a terminal Ctrl-C ends an answer and nothing else."""

    def __init__(self, answering: Answering, state: ChatState, *, plain: bool, at_terminal: bool) -> None:
        self.state = state
        self._answering = answering
        self._plain = plain
        self._at_terminal = at_terminal

    def check(self) -> None:
        """Raises RequestError when the model cannot be talked with."""
        if not self._plain:
            self._answering.check(self._request("."))

    def turn(self, line: str) -> bool:
        """Does what a line says, or answers it; False when the chat is to end."""
        try:
            if is_command(line):
                return run_command(self.state, line)
        except typer.BadParameter as error:
            raise wrong_usage(error) from error
        if line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def _answer(self, said: str) -> None:
        """Streams the answer to a message, which stays in the conversation with what was shown of it, if anything."""
        shown: list[str] = []
        reason = None
        with _Interruption() as interruption, self._stream(said) as stream:
            try:
                for event in stream:
                    with interruption.held():
                        show_text(event.text)
                        shown.append(event.text)
                    reason = event.finish_reason or reason  # the usage of a server comes behind it
            except KeyboardInterrupt:
                if not self._at_terminal:
                    raise
            if answer := "".join(shown):
                self.state.conversation.turns.append((said, answer))
            with interruption.held():
                print(flush=True)
        if self._at_terminal and reason is FinishReason.LENGTH:
            print_message("cut off: --max-tokens or the model allows no more", style="dim")
        if self._at_terminal and not answer:
            print_message("nothing was answered, and the message is taken back", style="dim")

    def _stream(self, said: str) -> AbstractContextManager[Iterable[AnswerEvent]]:
        return self._answering.stream(self._request(said))

    def _request(self, said: str) -> lorax_core.GenerateRequest:
        """What asks for the answer to a message."""
        state, prompt = self.state, None
        options: dict[str, Any] = {"adapter": state.adapter, **state.options}
        if self._plain:
            prompt = state.conversation.plain(said)
            options["stop"] = [*options.get("stop", []), PLAIN_STOP]
        return lorax_core.GenerateRequest(prompt=prompt or state.conversation.messages(said), **options)


def _at_terminal(talk: Talk, lines: Lines, *, debug: bool) -> None:
    """Until the user ends it: what is wrong with a message, and Ctrl-C, end that message alone."""
    while True:
        try:
            message = read_message(lines, f"{printable(talk.state.speaker)}> ")
            if message is None or not talk.turn(message):
                return
        except OutputError:
            raise
        except LoraxError as error:
            if debug:
                traceback.print_exception(error)
            print_error(at_command_line(error, "lorax chat"))
        except KeyboardInterrupt:
            print_message("\nCtrl-D or /quit ends the chat", style="dim")


def _through_pipe(talk: Talk, lines: Lines) -> None:
    """Until the last line, or the first that is wrong."""
    while (message := read_message(lines, "")) is not None and talk.turn(message):
        pass
