"""The command `lorax` in processes of its own that need not import torch again: a server imports it once, and forks.

`with ForkedLorax(folder) as lorax` gives the path of an executable for any shell or Popen. It hands its arguments,
environment, folder and three streams to the server, and ends as the forked process did. What Python does before it imports
anything, with a closed stream or a locale, is what the server did: tests of that start Python themselves.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

IMPORTED = ("torch", "transformers.models.auto.tokenization_auto", "lorax_core.serving.engine", "lorax_core.cli.main")
_REQUEST = 2**20  # bytes: arguments and environment
_DEADLINE = 120


class ForkedLorax:
    """Starts the server, with `environ` over the environment of this process; `close` ends it with all that it forked."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        # Not below pytest's folders: the path of a socket has 108 bytes at most.
        self._folder = Path(tempfile.mkdtemp(prefix="lorax-"))
        self.path = self._folder / "lorax"
        address = str(self._folder / "socket")
        own = [sys.executable, "-W", "error", __file__, "serve", address]
        pipe = subprocess.PIPE
        env = {**os.environ, **(environ or {})}
        # It reads nothing from stdin, whose end says that this process has ended without a close.
        self._server = subprocess.Popen(own, env=env, stdin=pipe, stdout=pipe, start_new_session=True)
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b"ready\n":
            self.close()
            raise RuntimeError("the server of forked processes did not start")
        command = shlex.join([sys.executable, "-I", "-S", __file__, "ask", address])
        self.path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        self.path.chmod(0o755)

    def __enter__(self) -> ForkedLorax:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def commands(self) -> list[int]:
        """The processes of the commands that run now."""
        return [command for keeper in _children(self._server.pid) for command in _children(keeper)]

    def close(self) -> None:
        """Ends the server, and whatever still runs."""
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate(timeout=_DEADLINE)
        shutil.rmtree(self._folder)


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def serve(address: str) -> list[str]:
    """Serves until stdin ends. Returns in each forked process, with the arguments of its command."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # nothing of that needs to be looked at again in each fork
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
            listening.close()
            sys.exit()
        connection, _ = listening.accept()
        if os.fork() == 0:
            break
        connection.close()
    # A process that stays to tell how the command ends, and below it the command.
    listening.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, streams, _, _ = socket.recv_fds(connection, _REQUEST, 3)
    command = os.fork()
    if command == 0:
        connection.close()
        return _become(*pickle.loads(data), streams)
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(command, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(arguments: list[bytes], environ: dict[bytes, bytes], folder: bytes, streams: list[int]) -> list[str]:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environb.clear()
    os.environb.update(environ)
    os.chdir(folder)
    return [os.fsdecode(argument) for argument in arguments]


def ask(address: str, arguments: list[str]) -> NoReturn:
    """Has the server run a command with the streams of this process, and ends as it does."""
    # As bytes: it is the server whose locale counts.
    request = [os.fsencode(argument) for argument in arguments], dict(os.environb), os.getcwdb()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        socket.send_fds(connection, [pickle.dumps(request)], [0, 1, 2])
        for number in range(3):  # of which only the command decides when they end
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        code = int(connection.recv(64))
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    from lorax_core.cli.main import main

    main(serve(sys.argv[2]))
