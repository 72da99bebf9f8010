"""What a terminal is shown of what a model wrote, and what errors say there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

import lorax_core
from lorax_core.cli.chat import Talk
from lorax_core.cli.chat_commands import ChatState
from lorax_core.cli.completions import show_text

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
        Talk(engine, ChatState({}, options={"choice": [TITLE]}), plain=True, at_terminal=False).turn("hi")

    assert stdout.getvalue() == f"{SHOWN}\n"
