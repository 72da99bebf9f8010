"""The demo as a newcomer runs it, and what it promises: real text, a bounded amount of it, errors that can be read."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "examples/demo.py"
MOST_TOKENS = 30_000


@pytest.fixture(scope="module")
def demo():
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def done():
    """The whole demo, run from another folder, its output in pipes."""
    return subprocess.run(
        [sys.executable, DEMO], cwd=DEMO.anchor, capture_output=True, text=True, timeout=240, check=False
    )


def answer(done, title):
    """What one voice wrote, without the prompt."""
    [text] = re.findall(rf"^\[{title}\] When an exception is raised(.*?)\n\n", done.stdout, re.DOTALL | re.MULTILINE)
    return text


def test_it_ends_well_and_keeps_talk_off_stdout(done):
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Done in \d+\.\d s\.$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert "Done in" not in done.stdout
    assert "loading" not in done.stdout


def test_it_lists_what_is_installed(done):
    assert re.search(r"^bert +embed\b.* bidirectional +yes +lorax-bert ", done.stdout, re.MULTILINE)
    assert re.search(r"^qwen2 +generate, embed\b.* causal +yes +lorax-qwen2 ", done.stdout, re.MULTILINE)


def test_it_answers_questions_and_says_what_that_took(done, demo):
    passages, tokens = re.search(
        r"(\d+) passages of .*: ([\d,]+) tokens in [\d.]+ s, [\d,]+ tokens/s", done.stdout
    ).groups()
    scores = [float(score) for score in re.findall(r"^ *(0\.\d\d) +\w", done.stdout, re.MULTILINE)]

    assert int(passages) > 100
    assert 10_000 < int(tokens.replace(",", "")) <= MOST_TOKENS
    assert len(scores) == demo.BEST * len(demo.QUESTIONS)
    assert min(scores[:: demo.BEST]) > 0.4
    assert "There is no limit for the length of integer literals" in " ".join(done.stdout.split())


def test_three_voices_answer_in_one_batch(done):
    assert re.search(r"^3 answers at once: \d+ tokens in [\d.]+ s, [\d,]+ tokens/s$", done.stdout, re.MULTILINE)
    base, upper, bullets = (answer(done, title) for title in ("base", "upper", "bullets"))
    assert re.search(r"[a-z]{3}", base)
    assert not re.search(r"^- ", base, re.MULTILINE)
    assert upper.isupper()
    assert len(re.findall(r"^- ", bullets, re.MULTILINE)) >= 2


@pytest.mark.parametrize("limit", [500, MOST_TOKENS])
def test_passages_are_distinct_prose_within_the_limit(demo, limit):
    passages = demo.read_passages(demo.minilm_folder(), limit)

    assert 0 < sum(passage.tokens for passage in passages) <= limit
    assert len({passage.text for passage in passages}) == len(passages)
    assert max(passage.tokens for passage in passages) <= demo.MINILM_TOKENS
    assert all(passage.text.endswith(".") and "::=" not in passage.text for passage in passages)


def test_passages_come_from_many_topics(demo):
    passages = demo.read_passages(demo.minilm_folder(), 5_000)

    assert len({passage.topic for passage in passages}) >= 30


def test_a_failure_is_told_with_the_way_out(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MINILM", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["demo.py"])

    code = demo.main()

    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("error: the package no_such_package")
    assert "hint: `make demo` installs it" in " ".join(err.split())
