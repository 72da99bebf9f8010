"""The command line as a user has it: a process of its own, with strangers installed on its path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# One set of strangers for both folders; a conftest cannot import its neighbour by name.
_found = importlib.util.spec_from_file_location("strangers", Path(__file__).parents[1] / "plugins/conftest.py")
assert _found is not None
assert _found.loader is not None
_module = importlib.util.module_from_spec(_found)
_found.loader.exec_module(_module)
strangers = _module.strangers


@pytest.fixture
def lorax(strangers, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `lorax` in a new process, in an empty folder, with warnings as errors; keywords are environment variables."""

    def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("LORAX_")}
        command = [sys.executable, "-W", "error", "-m", "lorax_core.cli.main", *arguments]
        # Before what this process imports from, which may be another tree than the installed one.
        path = os.pathsep.join(filter(None, (str(strangers.folder), os.environ.get("PYTHONPATH"))))
        env = {**outside, "PYTHONPATH": path, **environ}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    return run


LIGHT = """
import sys
from lorax_core.cli.main import main
try:
    main({arguments!r})
except SystemExit as error:
    assert not error.code, error.code
print(*sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture
def heavy() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `lorax` in a new process; the last line of its stderr names what it imported of torch, transformers and numpy."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIGHT.format(arguments=list(arguments))]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    return run


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `lorax` in this process: exit code, stdout, stderr."""
    from lorax_core.cli.main import main

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return run
