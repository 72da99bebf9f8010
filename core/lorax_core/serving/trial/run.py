"""Trials in a process of their own, and their verdicts, which are kept.

Decides how long a trial may take, what a verdict depends on and where it is kept. Knows nothing of what is tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from lorax_core.kernels import native
from lorax_core.kernels.native.build import processor
from lorax_core.kernels.native.trust import file_problem, folder_problem
from lorax_core.serving.trial.child import run_trial
from lorax_core.serving.trial.spec import TRIALS, Trial
from lorax_core.settings import Settings
from lorax_core.version import __version__

_log = logging.getLogger(__name__)

SECONDS: Final = 900.0
"""How long one trial may take: kernels are compiled in it, some for minutes."""
_PACKAGES = ("torch", "triton", "flashinfer-python", "flash-attn")
_MOST_BYTES = 1 << 20  # of a verdict that was kept


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a trial: `problem` is None when the kernels gave what they should. `kept`: it was tried before."""

    trial: Trial
    problem: str | None
    kept: bool = False


def machine() -> dict[str, str]:
    """What verdicts depend on beside the trial: processor, GPU and driver, and the versions of what computes on them."""
    found = {"lorax-core": __version__, "python": platform.python_version(), "cuda": str(torch.version.cuda)}
    # A home may be shared by machines.
    found["processor"] = hashlib.sha256(processor()).hexdigest()[:16]
    sources = sorted(Path(native.__path__[0]).glob("*.cpp"))
    found["compiled"] = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        driver = Path("/proc/driver/nvidia/version")
        with contextlib.suppress(OSError):
            found["driver"] = driver.read_text().splitlines()[0]
    return found


class Trials:
    """Runs trials and keeps their verdicts in `settings.cache`; `facts` are what verdicts depend on, see `machine`."""

    def __init__(self, settings: Settings, facts: Mapping[str, str] | None = None, seconds: float = SECONDS) -> None:
        self._cache = settings.cache
        self._facts = facts
        self._seconds = seconds

    def problem(self, trial: Trial) -> str | None:
        """Why the kernels of a trial are not to be used; None when they may be."""
        (verdict,) = self.verdicts([trial])
        return verdict.problem

    def problem_here(self, trial: Trial) -> str | None:
        """The same, tried in this process: for kernels that core compiles itself, which fail by their numbers alone."""
        verdict = self._kept(trial)
        if verdict is None:
            verdict = Verdict(trial, run_trial(trial))
            self._keep(verdict)
        return verdict.problem

    def verdicts(
        self, trials: Sequence[Trial], *, again: bool = False, seen: Callable[[Verdict], None] | None = None
    ) -> list[Verdict]:
        """The verdict of each trial, in order; with `again` those that were kept do not count. `seen` gets each as it comes."""
        found: list[Verdict | None] = [None if again else self._kept(trial) for trial in trials]
        seen = seen or _unseen
        for verdict in filter(None, found):
            seen(verdict)
        left = [number for number, verdict in enumerate(found) if verdict is None]
        if left:
            _log.info("trying %d kinds of kernels of this machine for the first time", len(left))
        while left:
            problems = self._run([trials[number] for number in left])
            for number, problem in zip(left, problems, strict=False):
                found[number] = verdict = Verdict(trials[number], problem)
                self._keep(verdict)
                seen(verdict)
            left = left[len(problems) :]
        return [verdict for verdict in found if verdict is not None]

    def _run(self, trials: Sequence[Trial]) -> list[str | None]:
        """What is wrong with the first trials, at least one of them: a process that dies takes the others with it."""
        # As this process found its modules, so that plugins are there.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "lorax_core.serving.trial.child"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(TRIALS.dump_json(list(trials)), self._seconds * len(trials))
                ended = f"the process of the trial ended with {_ending(process.returncode)}"
            except subprocess.TimeoutExpired as error:
                output = error.output or b""
                ended = f"it took longer than {self._seconds:g} s"
            finally:
                # The whole group: compilers that it started would run on.
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        problems: list[str | None] = []
        for line in output.splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut short
                said = json.loads(line)
                if "done" in said:
                    problems.append(said["problem"])
        return problems if len(problems) == len(trials) else [*problems, ended]

    def _key(self, trial: Trial) -> str:
        if self._facts is None:
            self._facts = machine()
        text = json.dumps([trial.model_dump(mode="json"), dict(sorted(self._facts.items()))], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _kept(self, trial: Trial) -> Verdict | None:
        try:
            folder = self._folder()
            if folder_problem(folder.resolve(), os.geteuid()) is not None:
                return None
            file = folder / f"{self._key(trial)}.json"
            with file.open("rb") as opened:
                if file_problem(file, os.fstat(opened.fileno()), os.geteuid()) is not None:
                    return None
                said: Any = json.loads(opened.read(_MOST_BYTES))
            return Verdict(trial, said["problem"], kept=True)
        # None yet, or one that was cut short: it is tried again. RuntimeError: a user without a home.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return None

    def _keep(self, verdict: Verdict) -> None:
        said = {"trial": str(verdict.trial), "problem": verdict.problem, "machine": self._facts}
        try:
            folder = self._folder()
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder_problem(folder.resolve(), os.geteuid()) is not None:
                return
            file = folder / f"{self._key(verdict.trial)}.json"
            # Renamed into place: another process may read it now.
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(said, indent=1))
            part.replace(file)
        except (OSError, RuntimeError) as error:
            _log.info("a verdict could not be kept: %s", error)

    def _folder(self) -> Path:
        return self._cache.expanduser() / "trials"


def _unseen(_: Verdict) -> None:
    """Nobody waits for verdicts as they come."""


def _ending(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
