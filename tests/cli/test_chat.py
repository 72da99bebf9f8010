"""`lorax chat` on the small checkpoint that the repository ships: through a pipe, and at a terminal."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import make_bert

import lorax_core
from lorax_core.cli.answering import EngineAnswers
from lorax_core.cli.chat_commands import ChatState, completions, run_command
from lorax_core.cli.lines import read_message
from lorax_core.errors import LoraxError, RequestError

QWEN2 = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2"
MODEL = str(QWEN2 / "model")
ADAPTERS = {name: QWEN2 / "adapters" / name for name in ("upper", "bullets")}
GIVEN = [f"--adapter={name}={folder}" for name, folder in ADAPTERS.items()]
DEADLINE = 120
# A terminal between pipes: what is written into one is typed, and what the other gives is shown.
AT_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.fixture(scope="module")
def engine():
    with lorax_core.load(MODEL, adapters=ADAPTERS) as engine:
        yield engine


@pytest.fixture
def talk(main, monkeypatch):
    """Runs `lorax chat` with lines on stdin: exit code, stdout, stderr."""

    def run(lines: str, *arguments: str, model: str = MODEL):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        return main("chat", model, "--max-tokens=12", *arguments)

    return run


def said(*texts):
    """Messages, user and assistant in turns."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def test_each_line_is_answered_with_all_that_was_said_before(talk, engine):
    code, out, err = talk("List the files\n\nMore")

    first = engine.generate(said("List the files"), max_tokens=12).text
    second = engine.generate(said("List the files", first, "More"), max_tokens=12).text
    assert (code, err) == (0, "")
    assert out == f"{first}\n{second}\n"
    assert second != engine.generate(said("More"), max_tokens=12).text


def test_adapters_take_turns_in_one_conversation(talk, engine):
    _, out, err = talk(
        "/adapters\nList the files\n/use upper\nMore\n/use bullets=0.5,upper=0.4\nMore\n/adapters\n", *GIVEN
    )

    messages, answers = [], []
    for text, adapter in zip(
        ("List the files", "More", "More"), (None, "upper", {"bullets": 0.5, "upper": 0.4}), strict=True
    ):
        messages += said(text)
        answers.append(engine.generate(messages, adapter=adapter, max_tokens=12).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out.splitlines() == "\n".join(answers).splitlines()
    assert answers[1].isupper()
    assert err.startswith("* base\n  upper\n  bullets\nupper answers\nbullets=0.5,upper=0.4 answers\n")


def test_an_adapter_that_is_given_alone_answers(talk, engine):
    _, out, _ = talk("List the files\n/use base\nList the files", GIVEN[0])

    upper = engine.generate(said("List the files"), adapter="upper", max_tokens=12).text
    base = engine.generate(said("List the files", upper, "List the files"), max_tokens=12).text
    assert out == f"{upper}\n{base}\n"


def test_a_conversation_is_saved_and_gone_on_with(talk, engine, tmp_path):
    file = tmp_path / "chat.json"
    talk(f"List the files\n/save {file}\n", "--system", "Be short")
    first = json.loads(file.read_text())

    code, out, _ = talk(f"More\n/save {file}\n", "--history", str(file))
    second = json.loads(file.read_text())
    talk(f"/save {file}\n", "--history", str(file), "--system", "Be long")

    assert [one["role"] for one in first] == ["system", "user", "assistant"]
    assert first[0]["content"] == "Be short"
    answer = engine.generate([*first, *said("More")], max_tokens=12).text
    assert (code, out) == (0, answer + "\n")
    assert second == [*first, *said("More", answer)]
    assert json.loads(file.read_text()) == [{"role": "system", "content": "Be long"}, *second[1:]]
    assert os.listdir(tmp_path) == ["chat.json"]


def test_a_file_of_others_is_not_replaced_and_one_of_this_chat_is(tmp_path):
    state, mine, foreign = ChatState({}), tmp_path / "mine.json", tmp_path / "foreign.json"
    foreign.write_text("precious")

    run_command(state, f"/save {mine}")
    state.conversation.turns.append(("Go", "Gone"))
    run_command(state, f"/save {mine}")
    with pytest.raises(LoraxError, match="is there already, and not of this chat"):
        run_command(state, f"/save {foreign}")

    assert json.loads(mine.read_text()) == said("Go", "Gone")
    assert foreign.read_text() == "precious"


def test_what_was_said_is_taken_back(talk, engine):
    _, out, _ = talk(
        "List the files\nMore\n/undo\n/undo\nThe end\n/system Be short\n/clear\nThe end\n/system\n/undo\nThe end\n"
    )

    short = [{"role": "system", "content": "Be short"}]
    plain, told = (engine.generate([*before, *said("The end")], max_tokens=12).text for before in ([], short))
    assert plain != told
    assert out.splitlines()[-3:] == [plain, told, plain]


def test_sampling_options_are_set_and_left_to_their_defaults(talk, engine):
    _, out, err = talk(
        "/set temperature 0.9\n/set seed 0\n/set max-tokens 5\n/set stop the\n/set\nGo\n"
        "/clear\n/set temperature\n/set stop\nGo\n"
    )

    drawn = engine.generate(said("Go"), temperature=0.9, seed=0, max_tokens=5, stop=["the"]).text
    assert out == f"{drawn}\n{engine.generate(said('Go'), max_tokens=5).text}\n"
    assert "temperature 0.9\nseed 0\nmax-tokens 5\nstop ['the']\n" in err.replace("max-tokens 12\n", "")


def test_messages_of_several_lines(talk, engine):
    _, out, _ = talk('one \\\ntwo\n/clear\n"""\none\n two\n"""\n/clear\n"""one"""\n/clear\n//one\n')

    asked = ["one \ntwo", "one\n two", "one", "/one"]
    assert out == "".join(engine.generate(said(text), max_tokens=12).text + "\n" for text in asked)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["a\\"], "a\n"),
        (['"""a'], "a"),
        (['"""a', "b"], "a\nb"),
        (['  """', "a", '  b"""'], "a\n  b"),
        (['"""', '"""'], ""),
        (['a """b"""'], 'a """b"""'),
        ([], None),
    ],
)
def test_how_lines_are_joined(typed, message):
    left = list(typed)

    class Typed:
        def next(self, prompt):
            return left.pop(0) if left else None

    assert read_message(Typed(), "> ") == (message.removesuffix("\n") if message == "a\n" else message)


def test_a_text_that_ends_answers_may_begin_and_end_with_a_space():
    state = ChatState({})

    run_command(state, "/set stop  the ")

    assert state.options == {"stop": [" the "]}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/hepl", "did you mean /help?"),
        ("/use uper", "did you mean 'upper'?"),
        ("/use", "/use needs a name"),
        ("/set temperatur 1", "/set temperature VALUE"),
        ("/set temperature warm", "temperature is a number, not 'warm'"),
        ("/set temperature -1", "temperature"),
        ("/set min-tokens 13", "min_tokens 13 is more than max_tokens 12"),
        ("/undo", "nothing was said"),
        ("/save", "/save needs the name of a file"),
        ("/save /", "/ is there already"),
        ("/save /no/such/folder/file", "cannot be written"),
        ("/save " + "x" * 300, "cannot be written"),
        ("/save " + "x" * 250, "cannot be written"),
        ("/save a\0b", "cannot be written"),
        ("/save ~nobody-of-this-name/x", "cannot be written"),
    ],
)
def test_a_command_that_is_wrong_changes_nothing(line, told):
    state = ChatState({name: str(folder) for name, folder in ADAPTERS.items()}, options={"max_tokens": 12})

    with pytest.raises(LoraxError) as caught:
        run_command(state, line)

    assert told in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint
    assert (state.adapter, state.options, state.conversation.messages()) == (None, {"max_tokens": 12}, [])


@pytest.mark.parametrize(
    ("line", "told"),
    [("/use upper=half", "'upper=half' is not NAME=WEIGHT"), ("word " * 600, "/undo takes back the last message")],
    ids=["command", "message"],
)
def test_what_is_wrong_ends_a_pipe_after_the_answers_before(talk, line, told):
    code, out, err = talk(f"Go\n{line}\nGo\n", *GIVEN)

    assert (code, len(out.splitlines())) == (1, 1)
    assert told in " ".join(err.split())
    assert "hint: " in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "holds no list of messages"),
        ("[1]", "message 0 is 1"),
        (json.dumps(said("a")), "has no answer"),
        (json.dumps([*said("a", "b"), *said("a", "b")[1:]]), "message 2 of 'assistant' is out of turn"),
        ('[{"role": "tool", "content": "a"}]', "message 0 is"),
    ],
)
def test_a_history_that_is_none_is_refused_before_anything_is_loaded(main, tmp_path, monkeypatch, content, told):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Go\n")))
    (tmp_path / "chat.json").write_text(content)

    code, out, err = main("chat", "no-such-folder", "--history", str(tmp_path / "chat.json"))

    assert (code, out) == (1, "")
    assert told in " ".join(err.split())


def test_a_model_without_a_template_is_talked_with_in_plain_text(talk, tmp_path, engine):
    for file in Path(MODEL).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)

    refused, nothing, why = talk("Go\n", model=str(tmp_path))
    _, out, _ = talk("Go\nMore\n", "--plain", "--system", "Be short", model=str(tmp_path))

    assert (refused, nothing) == (1, "")
    assert "no chat template" in why
    assert "--plain" in why
    text = "Be short\n\nUser: Go\nAssistant:"
    first = engine.generate(text, max_tokens=12, stop="\nUser:").text
    second = engine.generate(f"{text}{first}\nUser: More\nAssistant:", max_tokens=12, stop="\nUser:").text
    assert out == f"{first}\n{second}\n"


def test_a_model_that_does_not_generate_is_not_talked_with(main, tmp_path):
    encoder = make_bert(tmp_path / "model")

    code, out, err = main("chat", str(encoder))

    assert (code, out) == (1, "")
    assert "does not generate text; its tasks are 'embed'" in " ".join(err.split())


def test_an_answer_is_cut_to_the_room_that_is_left(talk, engine):
    code, out, _ = talk("Go", "--max-tokens=100000", "--ignore-eos")

    room = engine.info().max_tokens - engine.count_tokens(said("Go"))
    assert code == 0
    assert out == f"{engine.generate(said('Go'), max_tokens=room, ignore_eos=True).text}\n"


def test_a_conversation_that_leaves_no_room_for_a_token_is_refused():
    full = SimpleNamespace(count_tokens=lambda *_, **__: 512, info=lambda: SimpleNamespace(max_tokens=512))

    with pytest.raises(RequestError, match="the conversation has 512 tokens, and the model reads 512") as caught:
        EngineAnswers(full).stream(lorax_core.GenerateRequest(prompt=said("Go"), max_tokens=5))

    assert "/undo" in caught.value.hint


def test_a_message_without_an_answer_is_taken_back(talk, engine, tmp_path):
    first = engine.generate(said("Go"), max_tokens=1).token_ids[0]

    code, out, _ = talk(f"Go\n/save {tmp_path / 'it.json'}\n", "--stop-token-id", str(first))

    assert (code, out) == (0, "\n")
    assert json.loads((tmp_path / "it.json").read_text()) == []


def test_a_stop_of_the_user_ends_plain_answers_too(talk, engine):
    text = "User: Go\nAssistant:"
    whole = engine.generate(text, max_tokens=12, stop="\nUser:").text
    word = whole.split()[-1]

    _, out, _ = talk("Go", "--plain", "--stop", word)

    assert word not in out
    assert out == f"{engine.generate(text, max_tokens=12, stop=[word, chr(10) + 'User:']).text}\n"


def test_words_of_commands_are_completed():
    state = ChatState({name: str(folder) for name, folder in ADAPTERS.items()})

    assert completions(state, "", "/u") == ["/use ", "/undo"]
    assert completions(state, "/use ", "") == ["upper", "bullets", "base"]
    assert completions(state, "/set ", "max") == ["max-tokens "]
    assert completions(state, "hello ", "/u") == []


class Terminal:
    """`lorax chat` at a terminal of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "lorax_core.cli.main", "chat", MODEL, *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        self.shown = ""

    def type(self, keys: str) -> None:
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def wait_for(self, text: str) -> str:
        """What is shown up to a text, and since the last one."""
        assert self.shows(text, DEADLINE), self.shown
        found, _, self.shown = self.shown.partition(text)
        return found

    def shows(self, text: str, seconds: float) -> bool:
        """Whether a text is shown by then."""
        ends = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self.process.stdout], [], [], max(ends - time.monotonic(), 0))[0]:
                return False
            chunk = os.read(self.process.stdout.fileno(), 4096)
            assert chunk, f"the chat has ended: {self.shown!r}"
            self.shown += chunk.decode()
        return True

    def press(self, key: str, text: str) -> None:
        """Type a key until a text is shown.

        When Ctrl-C comes just as a prompt appears, Python's readline does not notice it before the next key.
        """
        for _ in range(DEADLINE // 5):
            self.type(key)
            if self.shows(text, 5):
                break
        self.wait_for(text)


def test_at_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(tmp_path, engine):
    terminal = Terminal(tmp_path, *GIVEN, "--ignore-eos", "--max-tokens=480")
    try:
        greeting = terminal.wait_for("base> ")
        terminal.type("/use up\t\n")
        terminal.wait_for("upper> ")
        terminal.type("Go\n")
        terminal.wait_for("Go\r\n")
        terminal.wait_for(" ")  # of the answer, which has 480 tokens
        terminal.type("\x03")
        terminal.wait_for("upper> ")
        terminal.type("/save it.json\n/wrong\n")
        complaint = terminal.wait_for("// begins")
        terminal.wait_for("upper> ")
        terminal.press("\x03", "Ctrl-D or /quit ends the chat")
        terminal.wait_for("upper> ")
        terminal.type("\x04")
        code = terminal.process.wait(DEADLINE)
    finally:
        terminal.process.kill()
        terminal.process.communicate()

    first = engine.generate(said("Go"), adapter="upper", ignore_eos=True, max_tokens=24).text
    message, answer = json.loads((tmp_path / "it.json").read_text())
    assert "/help lists commands" in greeting
    assert message["content"] == "Go"
    assert answer["content"]
    assert first.startswith(answer["content"]) or answer["content"].startswith(first)
    assert engine.count_tokens(answer["content"]) < 470
    assert "no command is called /wrong" in complaint
    assert code == 0


def test_help_imports_neither_torch_nor_transformers_nor_numpy():
    code = (
        "import sys\nfrom lorax_core.cli.main import main\ntry:\n    main(['chat', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert "Usage: lorax chat" in done.stdout
    assert done.stderr.split() == []
