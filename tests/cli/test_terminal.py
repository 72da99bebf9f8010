"""What a terminal is shown of what a model wrote, and what errors say there."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path

import pytest

import lorax_core
from lorax_core.cli.answering import EngineAnswers
from lorax_core.cli.chat import Talk, _at_terminal
from lorax_core.cli.chat_commands import ChatState
from lorax_core.cli.completions import show_text
from lorax_core.cli.hints import at_command_line
from lorax_core.cli.served import ServedEvent
from lorax_core.errors import LoraxError

MODEL = str(Path(__file__).resolve().parents[2] / "examples/tiny_qwen2/model")
TITLE = "\x1b]0;mine\x07"
SHOWN = r"\x1b]0;mine\x07"


@pytest.fixture(scope="module")
def engine():
    with lorax_core.load(MODEL) as engine:
        yield engine


class Stdout(io.StringIO):
    """A stdout that is a terminal, or none."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_text_is_left_as_it_is_but_for_what_a_terminal_obeys(terminal):
    plain = "a\tb\n\xa0é 家 \N{WOMAN}\u200d\N{PERSONAL COMPUTER}"

    with contextlib.redirect_stdout(Stdout(terminal)) as stdout:
        show_text(plain + "\r\x9b\x7f\u202e")

    assert stdout.getvalue() == plain + (r"\r\x9b\x7f\u202e" if terminal else "\r\x9b\x7f\u202e")


@pytest.mark.parametrize("more", [["hi"], ["hi", "--n=2", "--temperature=1"], ["--file"]], ids=" ".join)
def test_answers_cannot_steer_a_terminal(main, tmp_path, more):
    (tmp_path / "texts.txt").write_text("hi\n")
    given = [*more, str(tmp_path / "texts.txt")] if more == ["--file"] else more

    with contextlib.redirect_stdout(Stdout(True)) as stdout:
        code, _, _ = main("generate", MODEL, *given, "--choice", TITLE)

    assert code == 0
    assert SHOWN in stdout.getvalue()
    assert "\x1b" not in stdout.getvalue()


def test_answers_of_a_chat_cannot_either(engine):
    with contextlib.redirect_stdout(Stdout(True)) as stdout:
        Talk(EngineAnswers(engine), ChatState({}, options={"choice": [TITLE]}), plain=True, at_terminal=False).turn(
            "hi"
        )

    assert stdout.getvalue() == f"{SHOWN}\n"


@pytest.mark.parametrize(
    ("hint", "typed"),
    [
        ("help(lorax_core.GenerateRequest) says what each option takes", "lorax x --help lists the options"),
        ("help(lorax_core.server.ServerOptions) says what each option takes", "lorax x --help lists the options"),
        ('dtype="float16"', "--dtype float16"),
        ("load the base in float32: load(..., dtype='float32')", "load the base in float32: --dtype float32"),
        ("use it unmerged: load(..., adapters={'NAME': SOURCE})", "use it unmerged: --adapter NAME=SOURCE"),
        ("load(..., merge_adapter=SOURCE), or merge it", "--merge-adapter SOURCE, or merge it"),
        ("adapters.load(..., task='token-classification') or", "--task token-classification or"),
        ("truncate='end' or truncate='start' shortens it", "--truncate end or --truncate start shortens it"),
        ("give the prompt itself: prompt='query: '", "give the prompt itself: --prompt 'query: '"),
        ("json_schema follows JSON Schema", "--schema follows JSON Schema"),
        ("give stop_token_ids, or --schema", "give --stop-token-id, or --schema"),
        ("save_pretrained(..., save_embedding_layers=True)", "save_pretrained(..., save_embedding_layers=True)"),
        (None, None),
    ],
)
def test_hints_have_flags_at_a_command_line(hint, typed):
    assert at_command_line(LoraxError("it failed", hint=hint), "lorax x").hint == typed


def test_errors_of_a_command_have_its_flags_and_its_help_page(main):
    _, _, err = main("generate", MODEL, "hi", "--schema={}", "--regex=a")

    assert err == (
        "error: --schema, --regex and --choice exclude each other\n  hint: lorax generate --help lists the options\n"
    )


class Interrupted(Stdout):
    """A terminal at which Ctrl-C is pressed while a text is written."""

    def write(self, text):
        if text == "two":
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


class Pieces:
    """Answers with three pieces."""

    def stream(self, _request):
        return contextlib.nullcontext(ServedEvent(text) for text in ("one", "two", "three"))


@pytest.mark.parametrize("at_terminal", [True, False])
def test_ctrl_c_within_a_piece_ends_the_answer_behind_it(at_terminal):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # those who run tests have their own
    talk = Talk(Pieces(), ChatState({}), plain=False, at_terminal=at_terminal)

    try:
        with contextlib.redirect_stdout(Interrupted(True)) as stdout:
            ends = contextlib.nullcontext() if at_terminal else pytest.raises(KeyboardInterrupt)
            with ends:
                talk.turn("Hello")
    finally:
        after = signal.signal(signal.SIGINT, before)

    assert stdout.getvalue() == ("onetwo\n" if at_terminal else "onetwo")
    assert talk.state.conversation.turns == ([("Hello", "onetwo")] if at_terminal else [])
    assert after is signal.default_int_handler


def test_errors_of_a_chat_have_them_too(engine, capsys):
    class Typed:
        given = iter(["/set temperature -1", None])

        def next(self, _prompt):
            return next(self.given)

    _at_terminal(Talk(EngineAnswers(engine), ChatState({}), plain=True, at_terminal=True), Typed(), debug=False)

    assert "hint: lorax chat --help lists the options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["generate", "a", "b", f"--logit-bias={'9' * 5_000}=1"], 2, "is not ID=VALUE"),
        (["classify", "a", "b", "--adapter=c=d", f"--label={'9' * 5_000}=x"], 2, "is not ID=NAME"),
        (["adapters", "merge", "a", "--out", "b" * 5_000], 1, "cannot be written: OSError"),
        (["models", "check", "b" * 5_000], 1, "is not a folder: OSError"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_absurd_arguments_are_errors(main, arguments, code, complaint):
    found, out, err = main(*arguments)

    assert (found, out) == (code, "")
    assert complaint in " ".join(err.replace("│", "").split())
    assert len(err) < 2_000
