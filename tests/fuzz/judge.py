"""The oracle: runs an attempt against us and its reference, and says what came of it."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fuzz.bases import quiet
from fuzz.verdicts import Finding, Kind, Verdict
from lorax_core.errors import LoraxError, StepError

TOLERANCE = 1e-3
"""Of the largest number that the reference gives. Mutated models are often badly conditioned; a mistake is far larger."""
REFERENCE_SECONDS = 8
MEMORY = 2**30
"""Bytes that a case may take beyond what its worker holds already; the tiny models take under one hundredth."""

Answer = Mapping[str, Any]


class CannotJudge(Exception):
    """The reference does not say what the answer is, for the reason given."""


class Wrong(Exception):
    """An independent validator refuses an answer of ours."""


@dataclass
class Attempt:
    """One case, ready to run.

    `ask` gives our answer or raises. `refer` is given it and a seed, and gives the reference's answer under the same keys; it
    raises CannotJudge where there is none, and its result may depend on the seed only where the files do not determine
    it. `exactly` is `refer` in float64, to measure what the reference loses. `must_refuse` says why no answer may come;
    `same` that none may be refused, for the mutation changes nothing. `secrets` may not stand in an error.
    """

    ask: Callable[[], Answer]
    refer: Callable[[Answer, int], Answer]
    exactly: Callable[[Answer, int], Answer] | None = None
    changes: list[str] = field(default_factory=list)
    must_refuse: str = ""
    same: bool = False
    secrets: tuple[str, ...] = ()
    check: Callable[[], tuple[Finding, str] | None] = lambda: None
    engines: tuple[str, ...] = ("qwen2",)  # of the house, that must answer their probes afterwards


@dataclass(frozen=True)
class Outcome:
    """A verdict without the name of its case."""

    kind: Kind
    finding: Finding | None = None
    error: str = ""
    where: str = ""
    detail: str = ""

    def verdict(self, campaign: str, seed: int, case: int, changes: list[str], seconds: float) -> Verdict:
        said = [clean(change)[:300] for change in changes]
        return Verdict(
            campaign,
            seed,
            case,
            self.kind,
            self.finding,
            self.error,
            self.where,
            clean(self.detail)[:1500],
            said,
            seconds,
        )


def clean(text: str) -> str:
    """Text that any terminal and file takes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def judge(attempt: Attempt, enter: Callable[[str], None] = lambda phase: None) -> Outcome:
    """What came of an attempt. `enter` is told of each phase before it begins: "ours", then "reference"."""
    enter("ours")
    started = resident(peak=True)
    try:
        answer = attempt.ask()
    except BaseException as error:
        outcome = _refused(attempt, error)
    else:
        outcome = None
    grown = peak() - started
    if grown > MEMORY:
        return Outcome(Kind.FINDING, Finding.MEMORY, detail=f"{grown / 2**20:,.0f} MiB more")
    found = attempt.check()
    if found is not None:
        return Outcome(Kind.FINDING, found[0], detail=found[1])
    if outcome is not None:
        return outcome
    if attempt.must_refuse:
        return Outcome(Kind.FINDING, Finding.ACCEPTED, detail=attempt.must_refuse)
    bad = not_finite(answer)
    if bad:
        return Outcome(Kind.FINDING, Finding.NOT_FINITE, detail=bad)
    enter("reference")
    return _compared(attempt, answer, enter)


def _refused(attempt: Attempt, error: BaseException) -> Outcome:
    name = type(error).__name__
    if isinstance(error, Wrong):
        return Outcome(Kind.FINDING, Finding.WRONG, detail=str(error))
    where = raised_in(error.__traceback__)
    # Of a batch whose requests fail one by one, each error counts.
    results = error.results if isinstance(error, StepError) else []
    inner = [one for one in results if isinstance(one, BaseException)]
    for one in inner or [error]:
        if not isinstance(one, LoraxError):
            return Outcome(
                Kind.FINDING, Finding.BARE, type(one).__name__, raised_in(one.__traceback__) or where, f"{one}"
            )
        broken = _accident(one)
        if broken is not None:
            where = raised_in(broken.__traceback__) or where
            return Outcome(Kind.FINDING, Finding.BARE, type(broken).__name__, where, f"{one}")
    text = str(error)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Outcome(
            Kind.FINDING, Finding.BARE, "UnicodeEncodeError", where, f"an error that cannot be printed: {text!a}"
        )
    leaked = [secret for secret in attempt.secrets if secret in text]
    if leaked:
        return Outcome(Kind.FINDING, Finding.LEAK, name, where, f"{leaked[0]!r} in: {text}")
    if attempt.same:
        return Outcome(Kind.FINDING, Finding.OVERSTRICT, name, where, text)
    for one in inner or [error]:
        if isinstance(one, LoraxError) and not (one.hint or "").strip():
            return Outcome(
                Kind.FINDING, Finding.NO_HINT, type(one).__name__, raised_in(one.__traceback__) or where, f"{one}"
            )
    return Outcome(Kind.REFUSED, error=name, where=where, detail=text)


def _accident(error: LoraxError) -> BaseException | None:
    """The exception that broke a step or the start of a call: wrapped in an error of ours, which nobody meant."""
    return error.__cause__ if error.message.startswith(("the step failed", "the call could not start")) else None


def _compared(attempt: Attempt, answer: Answer, enter: Callable[[str], None]) -> Outcome:
    try:
        with quiet(), alarm(REFERENCE_SECONDS):
            expected = attempt.refer(answer, 0)
    except Wrong as error:
        return Outcome(Kind.FINDING, Finding.WRONG, detail=str(error))
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, CannotJudge) else f"the reference raises {type(error).__name__}: {error}"
        )
        return _weak(attempt, answer, reason, enter)
    apart = difference(answer, expected)
    if apart is None:
        return Outcome(Kind.EQUAL)
    try:
        with quiet(), alarm(REFERENCE_SECONDS):
            again = attempt.refer(answer, 1)
            exact = attempt.exactly(answer, 0) if attempt.exactly is not None else None
    except BaseException as error:
        return _weak(attempt, answer, f"the reference raises the second time: {type(error).__name__}: {error}", enter)
    if difference(expected, again) is not None:
        return _weak(attempt, answer, "the files do not determine the reference's answer", enter)
    if exact is not None:
        loss = difference(expected, exact, tolerance=0.0)
        if not_finite(expected) or (isinstance(loss, float) and isinstance(apart, float) and apart <= 10 * loss):
            return _weak(attempt, answer, f"badly conditioned: the reference itself loses {loss}", enter)
    if not_finite(expected):
        return _weak(attempt, answer, "the reference's answer is not finite", enter)
    return Outcome(Kind.FINDING, Finding.WRONG, detail=f"apart by {apart}: {describe(answer, expected)}")


def _weak(attempt: Attempt, answer: Answer, reason: str, enter: Callable[[str], None]) -> Outcome:
    """Held to be the same when asked for again."""
    enter("ours")
    try:
        again = attempt.ask()
    except BaseException as error:
        return Outcome(Kind.FINDING, Finding.UNSTEADY, type(error).__name__, raised_in(error.__traceback__), f"{error}")
    if difference(answer, again, tolerance=1e-6) is not None:
        return Outcome(Kind.FINDING, Finding.UNSTEADY, detail=describe(answer, again))
    return Outcome(Kind.WEAK, detail=reason)


def numbers(value: Any) -> list[float] | None:
    """A flat list of numbers, None when the value is anything else."""
    if isinstance(value, float):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return value
    return None


def difference(found: Answer, expected: Answer, tolerance: float = TOLERANCE) -> float | str | None:
    """None when both are the same; how far apart numbers are as a share of the largest; or the key whose values differ."""
    if found.keys() != expected.keys():
        return "keys"
    most = 0.0
    for key, value in found.items():
        ours, theirs = numbers(value), numbers(expected[key])
        if ours is None or theirs is None:
            if value != expected[key]:
                return key
            continue
        if len(ours) != len(theirs):
            return key
        scale = max((abs(number) for number in theirs if math.isfinite(number)), default=0.0)
        for a, b in zip(ours, theirs, strict=True):
            if a != b and not (math.isnan(a) and math.isnan(b)):
                apart = abs(a - b) / scale if scale and math.isfinite(a) and math.isfinite(b) else math.inf
                # Of numbers that are all next to nothing, the share says nothing.
                most = max(most, apart if scale > 1e-6 else abs(a - b))
    return most if most > tolerance else None


def describe(found: Answer, expected: Answer) -> str:
    """The first key that differs."""
    for key in found:
        if difference({key: found[key]}, {key: expected.get(key)}, tolerance=1e-6) is not None:
            return f"{key}: {found[key]!r:.300} and not {expected.get(key)!r:.300}"
    return f"keys {sorted(found)} and not {sorted(expected)}"


def not_finite(answer: Answer) -> str:
    """The key with NaN or infinite numbers, empty when there is none."""
    for key, value in answer.items():
        if not all(math.isfinite(number) for number in numbers(value) or []):
            return f"{key}: {value!r:.200}"
    return ""


def raised_in(trace: TracebackType | None) -> str:
    """`file:function` of the innermost frame of ours, the gate and the vocabulary left out where others are there."""
    found = []
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename).as_posix()
        match = re.search(r"/(?:core/lorax_core|src)/([a-z_0-9/]+\.py)$", file) or re.search(
            r"/(lorax_[a-z0-9]+/[a-z_]+\.py)$", file
        )
        if match:
            found.append(f"{match[1]}:{trace.tb_frame.f_code.co_name}")
        trace = trace.tb_next
    inner = [one for one in found if not one.startswith(("untrusted.py", "options.py:__init__"))]
    return (inner or found or [""])[-1]


def resident(peak: bool = False) -> int:
    """Bytes that this process holds; `peak` begins a new measure of the most that it does."""
    if peak:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that this process held since `resident(peak=True)`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends code that runs too long with a TimeoutError, as far as it is Python."""

    def ring(signum: int, frame: Any) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(call: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """The result of a call, and how long it took."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start
