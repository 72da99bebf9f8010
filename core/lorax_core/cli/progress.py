"""How commands show how far long work is: a bar on stderr, on a terminal alone.

Decides the looks. Knows nothing of the work beyond its reports, `lorax_core.progress.Progress`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorax_core.progress import Progress, Report, silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextlib.contextmanager
def shown_progress() -> Iterator[Report]:
    """Shows what is reported within, and nothing in a pipe. Bars are gone afterwards."""
    # A log would get a line for each report.
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console

    with _bars(Console(stderr=True)) as bars:
        yield _Stages(bars)


def _bars(console: object) -> Bars:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False)  # type: ignore[arg-type]


class _Stages:
    """Reports to the bar of their stage; the one before is taken away."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._stage = ""
        self._task: TaskID | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._stage = progress.stage
            self._task = self._bars.add_task(progress.stage, total=progress.total, amount="")
        (task,) = self._bars.tasks
        amount = _amount(progress, task.speed or 0)
        self._bars.update(task.id, completed=progress.done, total=progress.total, amount=amount)


def _amount(progress: Progress, rate: float) -> str:
    if progress.unit != "B":
        count = f"{progress.done:,} of {progress.total:,}" if progress.total is not None else f"{progress.done:,}"
        per_second = f", {rate:,.{0 if rate >= 10 else 1}f} a second" if rate and progress.unit else ""
        return f"{count} {progress.unit}{per_second}".rstrip()
    size, unit = (1e9, "GB") if max(progress.done, progress.total or 0) >= 1e9 else (1e6, "MB")
    shown = " / ".join(f"{one / size:.2f}" for one in (progress.done, progress.total) if one is not None)
    return f"{shown} {unit}, {rate / size:.2f} {unit}/s" if rate else f"{shown} {unit}"
