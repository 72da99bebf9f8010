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
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from lorax_core.kernels import native
from lorax_core.kernels.native.build import make_private, processor
from lorax_core.kernels.native.trust import file_problem, folder_problem
from lorax_core.progress import Progress, Report, silent
from lorax_core.serving.trial.child import run_trial
from lorax_core.serving.trial.spec import TRIAL, Trial
from lorax_core.settings import Settings
from lorax_core.version import __version__

_log = logging.getLogger(__name__)

SECONDS: Final = 900.0
"""How long one trial may take: kernels are compiled in it, some for minutes."""
_PACKAGES = ("torch", "triton", "flashinfer-python", "flash-attn")
_ENDED: Final = "the process of the trial ended with"
# What says nothing of the kernels: a machine without free memory now may have some the next time.
_PASSING: Final = ("out of memory", f"{_ENDED} SIGKILL", "OutOfMemoryError")
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
    sources = sorted(Path(native.__path__[0]).glob("*.[ch]*"))  # and headers
    sources += sorted(Path(__file__).parent.glob("*.py"))  # what is asked of them
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

    def __init__(
        self,
        settings: Settings,
        facts: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
        report: Report = silent,
    ) -> None:
        self._cache = settings.cache
        self._facts = dict(facts) if facts is not None else None
        self._seconds = seconds
        self._report, self._tried = report, 0

    def problem(self, trial: Trial) -> str | None:
        """Why the kernels of a trial are not to be used; None when they may be."""
        (verdict,) = self.verdicts([trial])
        return verdict.problem

    def problem_here(self, trial: Trial) -> str | None:
        """The same, tried in this process: for kernels that core compiles itself, which fail by their numbers alone."""
        verdict = self._kept(trial)
        if verdict is None:
            self._report_one()
            verdict = Verdict(trial, run_trial(trial))
            self._keep(verdict)
        return verdict.problem

    def _report_one(self) -> None:
        # How many there will be depends on what they find.
        self._report(Progress("trying kernels", self._tried))
        self._tried += 1

    def verdicts(
        self, trials: Sequence[Trial], *, again: bool = False, seen: Callable[[Verdict], None] | None = None
    ) -> list[Verdict]:
        """The verdict of each trial, in order; with `again` those that were kept do not count. `seen` gets each as it comes."""
        found: list[Verdict] = []
        for trial in trials:
            verdict = None if again else self._kept(trial)
            if verdict is None:
                _log.warning("trying %s (%s); kernels may be compiled for minutes, once", trial.subject, trial)
                self._report_one()
                verdict = Verdict(trial, self._run(trial))
                self._keep(verdict)
            found.append(verdict)
            if seen is not None:
                seen(verdict)
        return found

    def failures(self) -> dict[str, str]:
        """What failed a trial on this machine whose verdict is kept, by its path, with the reason."""
        found: dict[str, str] = {}
        for file in self._files():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(file.read_bytes()[:_MOST_BYTES])
                if said["problem"] is not None and said["machine"] == self._machine:
                    found[str(said["path"])] = str(said["problem"])
        return found

    def forget(self) -> None:
        """Drop all verdicts: the next engine tries its kernels again."""
        for file in self._files():
            with contextlib.suppress(OSError):
                file.unlink()

    def _files(self) -> list[Path]:
        try:
            return sorted(self._folder().glob("*.json"))
        except (OSError, RuntimeError):
            return []

    @property
    def _machine(self) -> dict[str, str]:
        if self._facts is None:  # at first use: asking a GPU wakes it
            self._facts = machine()
        return self._facts

    def _run(self, trial: Trial) -> str | None:
        """What is wrong with a trial. Each has a process of its own: after a fault of a GPU's memory that is of no use."""
        # As this process found its modules, so that plugins are there; and -P, for nothing of the current folder.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", "lorax_core.serving.trial.child"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(TRIAL.dump_json(trial), self._seconds)
            except subprocess.TimeoutExpired:
                return f"it took longer than {self._seconds:g} s"
            finally:
                # The whole group: compilers that it started would run on.
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        try:
            problem: str | None = json.loads(output)["problem"]
        except (ValueError, KeyError, TypeError):
            return f"{_ENDED} {_ending(process.returncode)}"
        return problem

    def _key(self, trial: Trial) -> str:
        order = [trial.model_dump(mode="json"), _code(trial), dict(sorted(self._machine.items()))]
        text = json.dumps(order, sort_keys=True)
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
            problem = said["problem"]
            if problem is not None and not (isinstance(problem, str) and problem):
                return None  # another program wrote it
            return Verdict(trial, problem, kept=True)
        # None yet, or one that was cut short: it is tried again. RuntimeError: a user without a home.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return None

    def _keep(self, verdict: Verdict) -> None:
        if verdict.problem is not None and any(word in verdict.problem for word in _PASSING):
            return
        said = {
            "path": verdict.trial.path,
            "trial": str(verdict.trial),
            "problem": verdict.problem,
            "machine": self._machine,
        }
        try:
            folder = self._folder()
            make_private(folder)
            if folder_problem(folder.resolve(), os.geteuid()) is not None:
                return
            file = folder / f"{self._key(verdict.trial)}.json"
            # Renamed into place: another process may read it now.
            part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            # For this user alone, whatever the umask: others could write a verdict of their own.
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
                json.dump(said, opened, indent=1)
            part.replace(file)
        except (OSError, RuntimeError) as error:
            _log.info("a verdict could not be kept: %s", error)

    def _folder(self) -> Path:
        return self._cache.expanduser() / "trials"


def _code(trial: Trial) -> str:
    """A hash of the module that is tried: a plugin's may change while every version here stays."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        found = find_spec(trial.path.partition(":")[0])
        if found is not None and found.origin is not None:
            return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:16]
    return ""


def _ending(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
