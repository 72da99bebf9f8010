"""The C++ compiler of this machine.

Decides which one is used, and how long it may run and how much it may print. Knows nothing of what is compiled.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_core.kernels.native.trust import program_problem

_NAMES = ("c++", "g++", "clang++")
SECONDS = 120
"""How long one run may take."""
_OUTPUT = 2**20  # bytes of messages


@dataclass(frozen=True, slots=True)
class Compiler:
    """A compiler, and the `PATH` on which it finds its own programs."""

    program: str
    path: str

    def run(self, *arguments: str, folder: Path) -> bytes:
        """Runs it in a folder, which should be private, and gives what it prints.

        Raises RuntimeError when it fails, takes too long or prints without end; whatever it started is ended then.
        """
        command = [self.program, *arguments]
        # Folder and TMPDIR: relative entries of CPATH and the like, and temporary files, must not lead to where others write.
        environment = {**os.environ, "PATH": self.path, "TMPDIR": str(folder), "LC_ALL": "C"}
        with subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                output = _output(process, time.monotonic() + SECONDS)
            except BaseException as error:
                # The whole group: a compiler starts others, which would run on.
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise RuntimeError(f"{' '.join(command)} took longer than {SECONDS} s and was ended") from error
                raise
        if process.returncode:
            said = output.decode(errors="replace").strip()
            raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}: {said[-400:]}")
        return output


def find_compiler(user: int) -> Compiler:
    """The first compiler on the `PATH` that only a user id and root can change; raises RuntimeError when there is none."""
    problems = []
    folders = []
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        # A relative one, and an empty one, means another folder wherever the process runs.
        if os.path.isabs(folder) and os.path.isdir(folder):
            problem = program_problem(Path(folder), user)
            problems += [problem] if problem is not None and _programs(folder) else []
            folders += [folder] if problem is None else []
    for name in _NAMES:
        for program in filter(None, (shutil.which(name, path=folder) for folder in folders)):
            problem = program_problem(Path(program), user)
            if problem is None:
                return Compiler(program, os.pathsep.join(folders))
            problems.append(problem)
    if problems:
        raise RuntimeError(f"no compiler is safe to run: {problems[0]}")
    raise RuntimeError(f"none of the compilers {', '.join(_NAMES)} is installed")


def _programs(folder: str) -> Sequence[str]:
    return [found for name in _NAMES if (found := shutil.which(name, path=folder))]


def _output(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """All that a process prints until it ends; raises TimeoutExpired or RuntimeError."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise subprocess.TimeoutExpired(process.args, SECONDS)
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            output += chunk
            if len(output) > _OUTPUT:
                raise RuntimeError("the compiler prints without end and was ended")
    process.wait(max(deadline - time.monotonic(), 0))
    return output
