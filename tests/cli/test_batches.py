"""The next batch of texts is submitted while one is computed, and nobody waits for texts that are not there."""

from __future__ import annotations

import os
import sys

import pytest

from lorax_core.cli import batches
from lorax_core.cli.batches import BATCH, Texts, answers
from lorax_core.errors import LoraxError


class Engine:
    """Answers a text by itself, and notes what is asked of it; refuses the text "bad", and fails with "late"."""

    def __init__(self):
        self.asked = []

    def submit(self, requests):
        if "bad" in requests:
            raise LoraxError("bad text", hint="give another")
        self.asked.append(("submit", requests[0]))
        return Call(self, requests)

    def run(self, requests):
        return self.submit(requests).wait()


class Call:
    def __init__(self, engine, requests):
        self.engine, self.requests = engine, requests

    def wait(self):
        self.engine.asked.append(("wait", self.requests[0]))
        if "late" in self.requests:
            raise LoraxError("failed text", hint="ask again")
        return self.requests


@pytest.fixture
def piped(monkeypatch):
    """stdin as a pipe; gives what writes to it."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as stdin, open(writing, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield writer


def numbered(count):
    return [f"text {at}" for at in range(count)]


def as_lines(texts):
    return "".join(f"{text}\n" for text in texts).encode()


def taken(engine, texts):
    """The answers until an error, and the error."""
    found = []
    try:
        for first, some in answers(engine, texts, str):
            assert first == len(found)
            found += some
    except LoraxError as error:
        return found, error.message
    return found, None


def test_a_batch_is_submitted_before_the_one_before_it_is_waited_for():
    engine = Engine()
    texts = numbered(2 * BATCH + 1)

    assert taken(engine, Texts(texts)) == (texts, None)

    first, second, third = "text 0", f"text {BATCH}", f"text {2 * BATCH}"
    assert engine.asked == [
        *(("submit", first), ("submit", second), ("wait", first)),
        *(("submit", third), ("wait", second), ("wait", third)),
    ]


def test_so_it_is_with_what_stdin_already_has(piped, monkeypatch):
    monkeypatch.setattr("lorax_core.cli.streams._CHUNK", 16)  # read in several parts
    engine, texts = Engine(), numbered(6)
    piped.write(as_lines(texts))
    piped.close()

    assert taken(engine, Texts(["-"])) == (texts, None)

    assert [what for what, _ in engine.asked[:3]] == ["submit", "submit", "wait"]


@pytest.mark.parametrize("rest", [b"", b"half a li"])
def test_a_line_is_answered_while_the_next_one_is_awaited(piped, rest):
    found = answers(Engine(), Texts(["-"]), str)
    piped.write(b"first\n")
    assert next(found) == (0, ["first"])

    piped.write(b"second\n" + rest)
    assert next(found) == (1, ["second"])

    piped.write(b"ne\n")
    piped.close()
    assert next(found) == (2, [rest.decode() + "ne"])
    assert list(found) == []


def test_what_a_read_gave_is_answered_though_the_next_one_gives_half_a_line(piped, monkeypatch):
    monkeypatch.setattr("lorax_core.cli.streams._CHUNK", 6)
    piped.write(b"first\nhalf")  # more is there when the first line is submitted, and no line of it

    assert next(answers(Engine(), Texts(["-"]), str)) == (0, ["first"])


@pytest.mark.parametrize("wrong", ["bad", "late"])
def test_an_error_comes_after_the_answers_before_it(wrong):
    texts = numbered(2 * BATCH)
    texts[BATCH + 3] = wrong

    found, error = taken(Engine(), Texts(texts))

    assert found == texts[: BATCH + 3]
    assert error == f"text {BATCH + 3}: {'bad' if wrong == 'bad' else 'failed'} text"


def test_what_stands_before_a_line_that_is_no_text_is_answered(piped, monkeypatch):
    monkeypatch.setattr("lorax_core.cli.streams._CHUNK", 8)
    piped.write(b"one\ntwo\n\xff\xff\n")
    piped.close()

    found, error = taken(Engine(), Texts(["-"]))

    assert found == ["one", "two"]
    assert "not UTF-8" in error


def test_no_more_than_two_batches_are_held():
    assert batches.BATCH == 256
    held, most = set(), 0

    class Counting(Engine):
        def submit(self, requests):
            nonlocal most
            held.add(requests[0])
            most = max(most, len(held))
            return super().submit(requests)

    for _, some in answers(Counting(), Texts(numbered(5 * BATCH)), str):
        held.discard(some[0])

    assert most == 2
