"""What `docs/first-steps.md` shows is what happens."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path

import pytest
from support.documents import blocks, console_steps, matches

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = blocks((ROOT / "docs/first-steps.md").read_text(encoding="utf-8"))
STEPS = [step for language, text in BLOCKS if language == "console" for step in console_steps(text)]


@pytest.mark.parametrize(("command", "shown"), STEPS, ids=[command[:50] for command, _ in STEPS])
def test_commands_print_what_is_shown(forked, command, shown):
    environment = {**os.environ, "PATH": os.pathsep.join([str(forked.path.parent), os.environ.get("PATH", "")])}

    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert matches(shown, done.stdout), f"the page shows:\n{shown}\nprinted was:\n{done.stdout}"


def test_the_example_in_python_prints_what_is_shown(monkeypatch):
    monkeypatch.chdir(ROOT)
    [(_, code), (_, shown)] = [block for block in BLOCKS if block[0] in ("python", "text")]

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "first-steps.md", "exec"), {})

    assert matches(shown, printed.getvalue())
