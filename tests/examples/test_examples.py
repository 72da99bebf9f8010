"""The short examples as a newcomer runs them, from another folder, and what they promise to print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "demo.py")


def printed(name):
    """What an example prints, its stderr left aside."""
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(command, cwd=EXAMPLES.anchor, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.name)
def test_an_example_is_short_and_listed(path):
    assert len(path.read_text("utf-8").splitlines()) < 60
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text("utf-8")


def test_rag_finds_the_right_document_and_three_writers_answer():
    text = printed("rag.py")

    copying, drawing = text.split("\n\n")[1:]
    assert re.search(r"^  0\.\d\d shutil\.copytree: Recursively copy", copying.splitlines()[1])
    assert re.search(r"^  0\.\d\d random\.randint: Return random integer", drawing.splitlines()[1])
    for answers in (copying, drawing):
        base, upper, bullets = re.findall(r"^  \[\w+\] (.*)$", answers, re.MULTILINE)
        assert re.search(r"[a-z]{3}", base)
        assert upper.isupper()
        assert "/ - " in bullets


def test_one_engine_answers_as_twenty_models_do_in_a_tenth_of_their_memory():
    text = printed("many_classifiers.py")

    right = int(re.search(r"highest for (\d+) of 20 new texts", text)[1])
    difference = float(re.search(r"between engine and models: (\S+)", text)[1])
    engine, models = (int(size) for size in re.findall(r" (\d+) MB +\d+ answers/s$", text, re.MULTILINE))
    assert right >= 10  # chance would give one
    assert difference < 2e-4  # of scores up to 30
    assert 10 * engine < models


def test_a_fine_tuned_adapter_signs_and_stops_where_the_base_runs_on():
    text = printed("finetune_and_serve.py")

    base, signed = (re.findall(rf"^\[{model}\] (.*)$", text, re.MULTILINE) for model in ("base", "signed"))
    assert len(base) == len(signed) == 3
    assert all(line.endswith("ended by length") and "-- the manual" not in line for line in base)
    assert all(re.search(r"\\n-- the manual['\"], ended by stop$", line) for line in signed)
