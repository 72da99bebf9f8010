"""Files of texts to files of answers: what a line is, how much is held, and that what was interrupted is continued."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lorax_core.cli.files import file_answers, write_answers
from lorax_core.cli.records import BEGINNING, Bounds, RecordFile
from lorax_core.cli.resuming import NoHead, PartFile
from lorax_core.errors import LoraxError, RequestError

FEW = Bounds(records=3)


class Engine:
    """Answers a text by itself in capitals. Refuses "bad", fails at "late", and breaks down at a call of some number."""

    def __init__(self, breaks_at=None):
        self.calls, self.breaks_at = [], breaks_at
        self.at_once = self.most_at_once = 0

    def submit(self, texts):
        if "bad" in texts:
            raise LoraxError("a bad text", hint="give another")
        self.calls.append(texts)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        return Call(self, texts, broken=len(self.calls) == self.breaks_at)


class Call:
    def __init__(self, engine, texts, *, broken):
        self.engine, self.broken = engine, broken
        late = LoraxError("a late failure", hint="ask again")
        self.results = [late if text == "late" else text.upper() for text in texts]

    def wait(self):
        self.engine.at_once -= 1
        if self.broken:
            raise MemoryError("planted")
        for one in self.results:
            if isinstance(one, LoraxError):
                raise one
        return self.results

    def cancel(self):
        pass


class Head:
    size, row = 4, None

    def data(self, records, written):
        return f"{records:2}{written:2}".encode()


def text_of(record):
    return record.text


def encoded(records, answers):
    return "".join(f"{record.line}{answer}." for record, answer in zip(records, answers, strict=True)).encode()


def given_lines(folder, lines, name="in.txt", bounds=FEW):
    file = folder / name
    file.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return RecordFile(file, bounds=bounds)


def records_of(given, start=BEGINNING):
    return [record for window in given.windows(start) for record in window.records]


def answered(engine, given):
    """All that was answered, and the error that ended it."""
    found = []
    try:
        for window, answers in file_answers(engine, given, text_of):
            assert len(answers) == len(window.records)
            found += answers
    except LoraxError as error:
        return found, error.message
    return found, None


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"one", ["one"]),
        (b"one\r\n\ntwo\n", ["one", "", "two"]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        ("a\u2028b\fc\n".encode(), ["a\u2028b\fc"]),
    ],
)
def test_a_line_is_a_record(tmp_path, data, texts):
    file = tmp_path / "in.txt"
    file.write_bytes(data)
    given = RecordFile(file, bounds=FEW)

    found = records_of(given)

    assert [record.text for record in found] == texts
    assert [record.line for record in found] == list(range(1, len(texts) + 1))
    assert given.count() == len(texts)


def test_a_line_of_json_names_its_text_and_itself(tmp_path):
    lines = ['{"id": 7, "text": "one"}', '{"text": "two", "body": "three"}']

    plain = records_of(given_lines(tmp_path, lines, "in.jsonl"))
    other = records_of(given_lines(tmp_path, lines, "in.ndjson"))
    (named,) = records_of(RecordFile(given_lines(tmp_path, lines[1:]).file, "body"))

    assert [(record.text, record.id) for record in plain] == [("one", 7), ("two", None)]
    assert other == plain
    assert named.text == "three"


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (b"\xff", "in.jsonl is not UTF-8: byte 1 of line 2 is 0xff", "iconv"),
        (b"{", "line 2 of .*in.jsonl is not JSON", "on one line"),
        (b"", "line 2 of .*in.jsonl is not JSON", "grep ."),
        (b"[" * 10**5, "line 2 of .*is not JSON: nested too deeply", "on one line"),
        (b'"text"', "line 2 of .*in.jsonl is not a JSON object: 'text'", '{"text": "..."} is one'),
        (b'{"texts": "a"}', "line 2 of .*has no field 'text'; it has 'texts'", "--field texts"),
        (b'{"body": "a", "number": 1}', "line 2 of .*has no field 'text'", "--field body"),
        (b'{"id": "1", "body": "a"}', "line 2 of .*it has 'id', 'body'", "--field NAME says"),
        (b'{"text": 5}', "line 2 of .*: the field 'text' is not text: 5", "--field NAME"),
        (rb'{"text": "\ud800"}', "line 2 of .* not valid Unicode", "UTF-8"),
        (b'"' + b"a" * 2**24 + b'"', "line 2 of .* has more than 16,777,216 bytes", "shorter"),
        (b'{"text": "a", "id": NaN}', "line 2 of .* holds the number NaN", "finite"),
        (b'{"text": "a", "id": [-Infinity]}', "line 2 of .* holds the number -Infinity", "finite"),
        (b'{"text": "a", "id": 1e999}', "line 2 of .* holds the number 1e999", "finite"),
    ],
    ids=range(14),
)
def test_what_is_no_record_is_told_with_its_line_after_those_before_it(tmp_path, line, message, hint):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')

    *windows, last = RecordFile(file).windows()

    assert windows == []
    assert ([record.text for record in last.records], last.end) == (["one"], None)
    with pytest.raises(RequestError, match=message) as caught:
        raise last.error
    assert hint in caught.value.hint


def test_a_file_that_is_not_there_is_told_by_its_name(tmp_path):
    for file in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(RequestError, match=f"{file.name} cannot be read"):
            RecordFile(file).check()


def test_stdin_is_read_like_a_file_and_continued_when_it_comes_again(monkeypatch):
    def given():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\nc\nd\n")))
        found = RecordFile(Path("-"), bounds=FEW)
        found.check()
        return found

    first = next(given().windows())

    assert given().count() is None
    assert [record.text for record in records_of(given(), first.end)] == ["d"]


def test_a_pipe_with_a_name_is_opened_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    given = RecordFile(pipe, bounds=FEW)
    writer = threading.Thread(target=pipe.write_bytes, args=[b"a\nb\n"])
    writer.start()

    given.check()
    counted = given.count()
    found = records_of(given)
    writer.join()

    assert (counted, [record.text for record in found]) == (None, ["a", "b"])


def test_a_reading_goes_on_behind_any_window(tmp_path):
    given = given_lines(tmp_path, "abcdefgh")
    windows = list(given.windows())

    assert [len(window.records) for window in windows] == [3, 3, 2]
    for window in windows:
        rest = records_of(given, window.end)
        assert [record.line for record in rest] == list(range(window.records[-1].line + 1, 9))


def test_what_is_read_already_may_not_change_and_what_is_not_may(tmp_path):
    given = given_lines(tmp_path, "abcdef")
    at = next(given.windows()).end

    given_lines(tmp_path, "abcXYZ and more")
    assert [record.text for record in records_of(given, at)] == list("XYZ and more")
    for changed in ("abXdef", "ab"):
        given_lines(tmp_path, changed)
        with pytest.raises(RequestError, match="changed within the 3 lines that are answered") as caught:
            records_of(given, at)
        assert "--restart" in caught.value.hint


def test_a_window_is_no_longer_than_its_bytes(tmp_path):
    given = given_lines(tmp_path, ["a" * 10] * 5, bounds=Bounds(records=100, bytes=20))

    assert [len(window.records) for window in given.windows()] == [2, 2, 1]


def test_no_more_than_two_windows_are_held(tmp_path):
    asked = answered = most = 0

    def counted(record):
        nonlocal asked, most
        asked += 1
        most = max(most, asked - answered)
        return record.text

    for _, answers in file_answers(Engine(), given_lines(tmp_path, "a" * 100), counted):
        answered += len(answers)

    assert (answered, most) == (100, 2 * FEW.records)


def test_windows_are_computed_one_after_the_other(tmp_path):
    engine = Engine()

    for window, _ in file_answers(engine, given_lines(tmp_path, "abcdefg"), text_of):
        # The next one is computed while this one is written.
        assert len(engine.calls) == min(window.records[0].line // FEW.records + 2, 3)

    assert engine.most_at_once == 1
    assert engine.calls == [list("abc"), list("def"), ["g"]]


@pytest.mark.parametrize("wrong", ["bad", "late"])
def test_an_error_of_a_line_comes_after_the_answers_before_it(tmp_path, wrong):
    given = given_lines(tmp_path, ["a", "b", "c", "d", wrong, "f"])

    found, error = answered(Engine(), given)

    assert found == ["A", "B", "C", "D"]
    assert error == f"line 5 of {given.file}: a {'bad text' if wrong == 'bad' else 'late failure'}"


@pytest.mark.parametrize("head", [NoHead(), Head()], ids=["lines", "head"])
@pytest.mark.parametrize("breaks_at", [1, 2, 3])
def test_what_was_interrupted_is_continued_to_the_same_bytes(tmp_path, head, breaks_at):
    given, out, whole = given_lines(tmp_path, "abcdefgh"), tmp_path / "out", tmp_path / "whole"
    write_answers(Engine(), given, text_of, PartFile(whole, {}), head, encoded)

    with pytest.raises(MemoryError):
        write_answers(Engine(breaks_at), given, text_of, PartFile(out, {}), head, encoded)
    assert not out.exists()
    again = Engine()
    write_answers(again, given, text_of, PartFile(out, {}), head, encoded)

    assert out.read_bytes() == whole.read_bytes()
    assert [text for call in again.calls for text in call] == list("abcdefgh")[3 * (breaks_at - 1) :]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.txt", "out", "whole"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lorax_core.cli import files, records, resuming

class Engine:
    calls = 0

    def submit(self, texts):
        self.calls += 1
        return Call(texts, killed=self.calls == 3)

class Call:
    def __init__(self, texts, killed):
        self.texts, self.killed = texts, killed

    def wait(self):
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.texts

given = records.RecordFile(Path(sys.argv[1]), bounds=records.Bounds(records=3))
resuming.SAVE_EVERY = float(sys.argv[3])
encode = lambda records, answers: "".join(f"{one.line}{one.text.upper()}." for one in records).encode()
part = resuming.PartFile(Path(sys.argv[2]), {})
files.write_answers(Engine(), given, lambda record: record.text, part, resuming.NoHead(), encode)
"""


@pytest.mark.parametrize(("save_every", "left"), [("0", "gh"), ("1000", "abcdefgh")])
def test_what_a_killed_process_had_saved_is_continued(tmp_path, save_every, left):
    given, out = given_lines(tmp_path, "abcdefgh"), tmp_path / "out"

    done = subprocess.run([sys.executable, "-c", KILLED, given.file, out, save_every], check=False, timeout=60)
    again = Engine()
    write_answers(again, given, text_of, PartFile(out, {}), NoHead(), encoded)

    assert done.returncode == -signal.SIGKILL
    assert [text for call in again.calls for text in call] == list(left)
    assert out.read_bytes() == b"1A.2B.3C.4D.5E.6F.7G.8H."


def interrupted(folder, job=None):
    """An output that was begun, with a window in it."""
    given, out = given_lines(folder, "abcdefgh"), folder / "out"
    with pytest.raises(MemoryError):
        write_answers(Engine(2), given, text_of, PartFile(out, job or {}), NoHead(), encoded)
    return given, out


def test_what_was_written_after_the_last_save_is_cut_off(tmp_path):
    given, out = interrupted(tmp_path)
    part = out.with_name("out.part")
    part.write_bytes(part.read_bytes() + b"half of someth")

    write_answers(Engine(), given, text_of, PartFile(out, {}), NoHead(), encoded)

    assert out.read_bytes() == b"1A.2B.3C.4D.5E.6F.7G.8H."


def test_another_job_is_refused_by_what_differs_and_restart_begins_anew(tmp_path):
    given, out = interrupted(tmp_path, {"model": "a", "--prompt": None})

    with pytest.raises(RequestError, match=r"out.part was begun with another model, --prompt") as caught:
        PartFile(out, {"model": "b", "--prompt": "query: "})
    anew = PartFile(out, {"model": "b"}, restart=True)
    write_answers(Engine(), given, text_of, anew, NoHead(), encoded)

    assert "--restart" in caught.value.hint
    assert out.read_bytes() == b"1A.2B.3C.4D.5E.6F.7G.8H."


@pytest.mark.parametrize(
    ("state", "told"),
    [("{}", "not of this version"), ("{", "is not JSON"), ('{"schema": 1, "job": {}}', "is damaged")],
)
def test_a_state_that_cannot_be_read_is_refused(tmp_path, state, told):
    _, out = interrupted(tmp_path)
    out.with_name("out.part.json").write_text(state)

    with pytest.raises(RequestError, match=told) as caught:
        PartFile(out, {})

    assert caught.value.hint == "start over: --restart"


def test_a_part_that_lost_its_end_is_refused(tmp_path):
    given, out = interrupted(tmp_path)
    out.with_name("out.part").write_bytes(b"1A")

    with pytest.raises(RequestError, match=r"out.part' is shorter than .* says"):
        write_answers(Engine(), given, text_of, PartFile(out, {}), NoHead(), encoded)


def test_a_file_that_is_there_is_replaced_only_when_that_is_said(tmp_path):
    given, out = given_lines(tmp_path, "abc"), tmp_path / "out"
    out.write_bytes(b"before")

    with pytest.raises(RequestError, match="out is there already") as caught:
        PartFile(out, {})
    part = PartFile(out, {}, overwrite=True)
    with pytest.raises(MemoryError):
        write_answers(Engine(1), given, text_of, part, NoHead(), encoded)
    kept = out.read_bytes()
    write_answers(Engine(), given, text_of, PartFile(out, {}, overwrite=True), NoHead(), encoded)

    assert "--overwrite" in caught.value.hint
    assert (kept, out.read_bytes()) == (b"before", b"1A.2B.3C.")


def test_where_nothing_can_be_written_is_told_first(tmp_path):
    with pytest.raises(RequestError, match="there is no folder") as caught:
        PartFile(tmp_path / "none/out", {})
    with pytest.raises(RequestError, match="is not a regular file"):
        PartFile(tmp_path, {}, overwrite=True)
    with pytest.raises(RequestError, match="is not a regular file"):
        PartFile(Path("/dev/null"), {}, overwrite=True)

    assert caught.value.hint == f"mkdir -p {tmp_path / 'none'}"


def test_two_processes_do_not_write_one_file(tmp_path):
    out = tmp_path / "out"

    with (
        PartFile(out, {}).writing(NoHead()),
        pytest.raises(RequestError, match="another process writes"),
        PartFile(out, {}).writing(NoHead()),
    ):
        raise AssertionError("the second one was not refused")

    assert out.read_bytes() == b""


def test_the_state_says_of_what_and_how_far(tmp_path):
    _, out = interrupted(tmp_path, {"model": "a"})

    state = json.loads(out.with_name("out.part.json").read_text())

    assert (state["schema"], state["job"]) == (1, {"model": "a"})
    assert [state[name] for name in ("records", "bytes", "written")] == [3, 6, 9]
