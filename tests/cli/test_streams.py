"""stdin, stdout and stderr of the command: what is read, in which portions, and what happens when one of them fails."""

from __future__ import annotations

import functools
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import make_bert, make_qwen2
from forked import ForkedLorax

import lorax_core
from lorax_core.cli import streams
from lorax_core.cli.batches import BATCH
from lorax_core.cli.render import printable
from lorax_core.cli.streams import _Output, read_lines

LORAX = [sys.executable, "-W", "error", "-m", "lorax_core.cli.main"]
DEADLINE = 120
# A machine whose user has no entry and no HOME, as in a container that runs under some number.
HOMELESS = """
import pwd, sys
def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from lorax_core.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A checkpoint whose tokenizer adds tokens, so that an empty text has a vector."""
    return str(make_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return str(make_qwen2(tmp_path_factory.mktemp("qwen2")))


def lorax(*arguments, text=b"", redirect="", command=LORAX, **environ):
    """`lorax` in a process of its own, below a shell that redirects its streams: exit code, stdout, stderr."""
    command = f"exec {shlex.join([*command, *arguments])} {redirect}"
    done = subprocess.run(
        ["sh", "-c", command],
        input=text,
        env={**os.environ, **environ},
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def running():
    """Starts `lorax` with pipes, and ends it after the test."""
    started = []

    def start(*arguments, command=LORAX):
        pipe = subprocess.PIPE
        process = subprocess.Popen([*command, *arguments], stdin=pipe, stdout=pipe, stderr=pipe)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE)


@pytest.fixture
def quick(forked):
    """The same for a process that is forked: for whatever does not depend on how Python starts."""
    return functools.partial(lorax, command=[str(forked.path)])


def is_one_error(err, *words):
    """Whether stderr is one error, with or without its hint."""
    lines = err.splitlines()
    assert lines[0].startswith("error: "), err
    assert all(line.startswith("  hint: ") for line in lines[1:]), err
    assert len(lines) <= 2, err
    assert all(word in err for word in words), err
    return True


def vectors(out):
    return np.array([json.loads(line)["vector"] for line in out.splitlines()], np.float32)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["models", "list"],
        ["models", "list", "--json"],
        ["embed", "QWEN2", "text"],
        ["embed", "QWEN2", "text", "--json"],
        ["generate", "QWEN2", "text", "--max-tokens", "2"],
    ],
    ids=" ".join,
)
def test_output_that_a_full_disk_does_not_take_is_an_error(quick, qwen2, arguments):
    words = [qwen2 if word == "QWEN2" else word for word in arguments]

    code, _, err = quick(*words, redirect="> /dev/full")

    assert code == 1
    assert is_one_error(err, "stdout cannot be written: No space left on device")


def test_a_closed_stdout_is_an_error_before_anything_is_done():
    code, _, err = lorax("embed", "no-such-folder", "text", redirect=">&-")

    assert code == 1
    assert is_one_error(err, "stdout is closed", "/dev/null")


@pytest.mark.parametrize("arguments", [["embed", "-"], ["generate", "-"]], ids=" ".join)
def test_a_closed_stdin_is_an_error_where_it_is_read(qwen2, arguments):
    code, out, err = lorax(arguments[0], qwen2, *arguments[1:], redirect="<&-")

    assert (code, out) == (1, "")
    assert is_one_error(err, "stdin is closed")


def test_a_closed_stdin_is_none_of_the_concern_of_those_who_do_not_read_it(qwen2):
    code, out, err = lorax("embed", qwen2, "text", redirect="<&-")

    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("redirect", ["2>&-", "2> /dev/full"])
def test_without_stderr_the_output_and_the_exit_code_are_the_same(quick, qwen2, redirect):
    run = lorax if redirect == "2>&-" else quick  # Python itself sees what is closed when it starts

    good, out, _ = run("embed", qwen2, "text", "--json", redirect=redirect)
    bad, nothing, _ = run("embed", "no-such-folder", "text", redirect=redirect)

    assert (good, bad, nothing) == (0, 1, "")
    assert vectors(out).shape == (1, 64)


def test_no_file_gets_the_number_of_a_closed_stream():
    code = (
        "import os, sys\nfrom lorax_core.cli.streams import standard_streams\n"
        "with standard_streams():\n    print(os.open('/dev/null', os.O_RDONLY) > 2)"
    )

    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join([sys.executable, '-c', code])} <&- 2>&-"],
        stdout=subprocess.PIPE, timeout=DEADLINE, check=True,
    )  # fmt: skip

    assert done.stdout == b"True\n"


def test_a_reader_who_has_enough_ends_the_command_without_a_word(forked, qwen2):
    endless = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    process = subprocess.Popen(
        [forked.path, "embed", qwen2, "-", "--json"],
        stdin=endless.stdout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    endless.stdout.close()
    try:
        first = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdout.close()
        code, err = process.wait(DEADLINE), process.stderr.read()
    finally:
        for one in (process, endless):
            one.kill()
            one.wait(DEADLINE)
        process.stderr.close()

    assert [line["index"] for line in first] == [0, 1, 2]
    assert (code, err) == (141, b"")


def test_a_line_is_answered_before_the_next_one_is_there(qwen2, running, forked):
    process = running("embed", qwen2, "-", "--json", command=[forked.path])
    found = []

    for text in ("first", "second"):
        process.stdin.write(f"{text}\n".encode())
        process.stdin.flush()
        found.append(process.stdout.readline().decode())

    with lorax_core.load(qwen2) as engine:
        expected = np.stack([engine.embed(text) for text in ("first", "second")])
    np.testing.assert_allclose(vectors("".join(found)), expected, atol=1e-5)


def test_ctrl_c_ends_it_with_what_was_answered(qwen2, running):
    process = running("embed", qwen2, "-", "--json")
    process.stdin.write(b"text\n")
    process.stdin.flush()
    line = process.stdout.readline()

    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=DEADLINE)

    assert json.loads(line)["index"] == 0
    assert (process.returncode, rest, err) == (130, b"", b"")


def memory(process):
    """What a process holds now, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("form", ["--json", "table"])
def test_a_long_input_takes_no_more_memory_than_a_short_one(forked, bert, form):
    endless = subprocess.Popen(["yes", "a text of some length"], stdout=subprocess.PIPE)
    options = [form] if form == "--json" else []
    command = [forked.path, "embed", bert, "-", *options]
    process = subprocess.Popen(command, stdin=endless.stdout, stdout=subprocess.PIPE)
    endless.stdout.close()
    held = []
    try:
        for count in (4 * BATCH, 12 * BATCH):
            for _ in range(count):
                process.stdout.readline()
            (running,) = forked.commands()
            held.append(memory(running))
    finally:
        process.stdout.close()
        process.wait(DEADLINE)
        endless.wait(DEADLINE)

    # All of the vectors as Python's floats would be 50 MiB.
    assert held[1] - held[0] < 20


def test_many_lines_are_answered_in_their_order(main, bert, monkeypatch):
    texts = [f"text {at} " + "x" * (at % 7) for at in range(2 * BATCH + 10)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))

    code, out, err = main("embed", bert, "-", "--json")

    with lorax_core.load(bert) as engine:
        expected = engine.embed(texts)
    assert (code, err) == (0, "")
    assert [json.loads(line)["index"] for line in out.splitlines()] == list(range(len(texts)))
    np.testing.assert_allclose(vectors(out), expected, atol=1e-5)


def test_a_table_of_many_lines_has_its_headings_once(main, bert, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text\n" * (BATCH + 10))))

    _, out, _ = main("embed", bert, "-")

    first, *rows = [line.split() for line in out.splitlines()]
    assert first[:3] == ["INDEX", "TOKENS", "DIM"]
    assert [row[0] for row in rows] == [str(at) for at in range(BATCH + 10)]


def given(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_only_line_feeds_end_a_line(monkeypatch):
    # All that str.splitlines takes for an end.
    inside = ["a\vb\fc", "d\x1ce\x1df\x1eg", "h\x85i\u2028j\u2029k", "l\rm"]
    given(monkeypatch, ("\n".join([*inside, "", "with CR\r", "last"])).encode())

    found = [line for lines in read_lines() for line in lines]

    assert found == [*inside, "", "with CR", "last"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", []), (b"\n", [""]), (b"a\n", ["a"]), (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", ["a", "\ufeffb"])],
)
def test_the_ends_of_stdin_are_as_editors_leave_them(monkeypatch, data, expected):
    given(monkeypatch, data)

    assert [line for lines in read_lines() for line in lines] == expected


def test_lines_longer_than_a_read_are_whole(monkeypatch):
    texts = ["é" * 100_000, "b" * 200_000, "c"]
    given(monkeypatch, "\n".join(texts).encode())

    assert [line for lines in read_lines() for line in lines] == texts


@pytest.mark.parametrize("command", ["embed", "classify"])
def test_a_form_feed_or_separator_within_a_line_splits_no_text(main, bert, monkeypatch, command, tmp_path):
    if command == "classify":
        import transformers as hf
        from builders import BERT, make_letter_tokenizer
        from oracles import make_model

        bert = tmp_path / "classifier"
        make_model(hf.BertForSequenceClassification, BERT, seed=3, num_labels=3).save_pretrained(bert)
        make_letter_tokenizer().save_pretrained(bert)
    given(monkeypatch, "a\fb\u2028c\x85d\n\nsecond\r\n".encode())

    code, out, _ = main(command, str(bert), "-", "--json")

    found = [json.loads(line) for line in out.splitlines()]
    with lorax_core.load(bert) as engine:
        tokens = [engine.count_tokens(text) for text in ("a\fb\u2028c\x85d", "", "second")]
    assert code == 0
    assert [line["tokens"] for line in found] == tokens


def test_an_empty_line_that_has_no_tokens_is_refused_by_its_number_after_what_stands_before(main, qwen2, monkeypatch):
    given(monkeypatch, b"first\n\nthird\n")

    code, out, err = main("embed", qwen2, "-", "--json")

    assert code == 1
    assert vectors(out).shape == (1, 64)
    assert is_one_error(err, "line 2: the prompt is empty")


def test_one_of_several_texts_is_named_when_it_is_refused(main, qwen2):
    code, out, err = main("embed", qwen2, "good", "long " * 600, "--json")

    assert code == 1
    assert len(out.splitlines()) == 1
    assert is_one_error(err, "text 1: an input of")


@pytest.mark.parametrize("command", ["embed", "generate"])
def test_input_that_is_not_utf_8_is_refused_by_line_and_byte(main, qwen2, monkeypatch, command):
    given(monkeypatch, b"good\n" * 2 + b"caf\xe9\n")

    code, out, err = main(command, qwen2, "-")

    assert code == 1
    assert is_one_error(err, "byte 4 of line 3 is 0xe9", "iconv")
    assert len(out.splitlines()) == (3 if command == "embed" else 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "PATH", b"caf\xe9"],
        ["generate", "PATH", b"caf\xe9"],
        ["generate", "PATH", "text", "--stop", b"caf\xe9"],
        ["classify", "PATH", "text", "--adapter", "it=FOLDER", "--label", b"0=caf\xe9"],
    ],
    ids=["embed", "generate", "stop", "label"],
)
def test_a_text_of_the_command_line_that_is_not_utf_8_is_a_wrong_command_line(arguments):
    command = [*LORAX, *arguments]

    done = subprocess.run(command, capture_output=True, timeout=DEADLINE, check=False)

    assert (done.returncode, done.stdout) == (2, b"")
    assert b"is not UTF-8" in done.stderr


def test_text_is_utf_8_in_any_locale(qwen2):
    # Python itself would help in the C locale, unless it is told not to.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    text = "né über 漢字"
    with lorax_core.load(qwen2) as engine:
        expected = engine.embed(text)

    # How Python starts matters here: with the locale of the server.
    with ForkedLorax(locale) as forked:
        run = functools.partial(lorax, command=[str(forked.path)], **locale)
        _, by_argument, _ = run("embed", qwen2, text, "--json")
        _, by_stdin, _ = run("embed", qwen2, "-", "--json", text=text.encode())
        code, _, err = run("generate", qwen2, text, "--max-tokens", "8", "--temperature", "3", "--seed", "1")
    refused, _, why = lorax("models", "show", "é", **locale)

    np.testing.assert_allclose(vectors(by_argument)[0], expected, atol=1e-5)
    np.testing.assert_allclose(vectors(by_stdin)[0], expected, atol=1e-5)
    assert code == 0, err
    assert refused == 1
    assert is_one_error(why, "no plugin provides model type")


def test_a_line_without_end_is_refused(quick, qwen2):
    code, out, err = quick("embed", qwen2, "-", redirect="< /dev/zero")

    assert (code, out) == (1, "")
    assert is_one_error(err, f"line 1 of stdin has more than {streams.MAX_TEXT:,} bytes")


def test_a_prompt_without_end_is_refused(quick, qwen2):
    code, out, err = quick("generate", qwen2, "-", redirect="< /dev/zero")

    assert (code, out) == (1, "")
    assert is_one_error(err, f"stdin has more than {streams.MAX_TEXT:,} bytes")


def test_a_stdin_that_does_not_wait_is_waited_for(forked, qwen2):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    process = subprocess.Popen([forked.path, "embed", qwen2, "-", "--json"], stdin=reader, stdout=subprocess.PIPE)
    os.close(reader)
    with open(writer, "wb") as late:
        late.write(b"first\n")
        late.flush()
        first = process.stdout.readline()
        late.write(b"second\n")
    rest, _ = process.communicate(timeout=DEADLINE)

    assert vectors((first + rest).decode()).shape == (2, 64)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["embed", "QWEN2", "text"], 0), (["embed", "some/name", "text"], 1)],
    ids=["folder", "hub id"],
)
def test_a_user_without_a_home_is_no_accident(qwen2, tmp_path, arguments, code):
    words = [qwen2 if word == "QWEN2" else word for word in arguments]
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "LORAX_CACHE")}

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HOMELESS, *words],
        env={**env, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip

    assert done.returncode == code
    assert done.stderr == "" if code == 0 else is_one_error(done.stderr, "some/name")


def test_what_a_terminal_would_obey_is_shown_and_not_done(main, tmp_path):
    code, _, err = main("embed", str(tmp_path / "\x1b]0;owned\x07\nforged"), "text")

    assert code == 1
    assert "\x1b" not in err
    assert r"\x1b]0;owned\x07" in err
    assert printable("é\t\u202e") == r"é\t\u202e"


class ThenInterrupted(io.FileIO):
    """Ctrl-C arrives when the data are written, and before Python knows it."""

    fresh = True

    def write(self, data, /):
        count = super().write(data)
        if self.fresh:
            self.fresh = False
            raise KeyboardInterrupt
        return count


class Interrupted(_Output, ThenInterrupted):
    pass


def test_what_an_interrupted_write_has_written_is_not_written_again(tmp_path):
    out = io.BufferedWriter(Interrupted(tmp_path / "out", "w"))
    out.write(b"line\n")
    with pytest.raises(KeyboardInterrupt):
        out.flush()

    out.close()

    assert (tmp_path / "out").read_bytes() == b"line\n"
