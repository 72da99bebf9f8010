"""docs/plugins.md, from an empty folder: its commands run, its excerpts are the files, its edits apply, and the kit passes."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

import pytest
from documents import blocks, console_steps, matches

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
COMMANDS = {"lorax": "lorax_core.cli.main", "pip": "pip", "pytest": "pytest"}


@pytest.fixture
def environment(tmp_path):
    """Variables of a fresh environment, which sees the packages of this one; pip builds without a network."""
    venv.create(tmp_path / "env", symlinks=True)
    [packages] = (tmp_path / "env/lib").glob("python*/site-packages")
    folders = [entry for entry in sys.path if entry.endswith("site-packages")]
    # addsitedir and not a plain path: editable packages are found by files in there.
    (packages / "borrowed.pth").write_text("".join(f"import site; site.addsitedir({one!r})\n" for one in folders))
    for name, module in COMMANDS.items():
        command = tmp_path / "env/bin" / name
        command.write_text(f'#!/bin/sh\nexec "{tmp_path}/env/bin/python" -P -m {module} "$@"\n')
        command.chmod(0o755)
    settings = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = os.pathsep.join([str(tmp_path / "env/bin"), os.environ["PATH"]])
    return {**os.environ, **settings, "PATH": path, "OMP_NUM_THREADS": "1"}


def is_quoted(text, folder):
    """Whether a block names a file in its first line; its other lines are then in it, in that order."""
    path, _, excerpt = text.removeprefix("# ").partition("\n")
    if not (folder / path).is_file():
        return False
    code = iter((folder / path).read_text(encoding="utf-8").splitlines())
    for line in excerpt.splitlines():
        if line.strip() not in {"", "# ..."}:
            assert line in code, f"{path} does not hold, at this place: {line}"
    return True


def apply_edit(text, folder):
    """Make the edits of a block; what they are made to is there once."""
    header, _, edits = text.partition("\n")
    file = folder / header.removeprefix("--- ")
    found = file.read_text(encoding="utf-8")
    for edit in edits.split("@@\n"):
        lines = edit.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert found.count(before) == 1, f"{file.name} does not hold once:\n{before}"
        found = found.replace(before, after)
    file.write_text(found, encoding="utf-8")


def run(command, folder, environment):
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def test_the_tutorial_goes_from_an_empty_folder_to_a_package_that_passes_the_kit(environment, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    done = Counter()

    for language, text in blocks(PAGE):
        if language == "console":
            for command, shown in console_steps(text):
                printed = run(command, folder, environment)
                assert matches(shown, printed), f"{command}\nshown is:\n{shown}\nprinted was:\n{printed}"
                done["commands"] += 1
        elif language == "diff":
            apply_edit(text, folder)
            done["edits"] += 1
        elif is_quoted(text, folder):
            done["excerpts"] += 1

    assert done == {"commands": 6, "excerpts": 6, "edits": 6}
    settings = [
        "--config",
        str(ROOT / "pyproject.toml"),
        "--config",
        f"src = ['{ROOT / 'core'}', '{folder}/lorax-granite/src']",
    ]
    for words in (["check"], ["format", "--check"]):
        run(
            " ".join(f'"{word}"' for word in [sys.executable, "-m", "ruff", *words, *settings, "lorax-granite/src"]),
            folder,
            environment,
        )
