"""How far long work is: what it reports, and to whom.

Decides the form of a report, and what a callback that fails means. Knows nothing of the work, nor of how it is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorax_core.errors import RequestError


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` in a stage of long work, such as "reading weights". `unit` is "B" for bytes, what is
    counted where its rate says something ("texts"), and else empty.

    `total` is None where it is not known before. A stage ends when `done` is `total`, or when another one begins.
    """

    stage: str
    done: int
    total: int | None = None
    unit: str = ""


Report = Callable[[Progress], None]
"""Called often, by the thread that does the work, which waits for it."""


def silent(progress: Progress) -> None:
    """Reports to nobody."""


def reporting(callback: Report | None) -> Report:
    """Reports to a callback, which ends the work with a RequestError when it raises; to nobody when it is None."""
    if callback is None:
        return silent

    def report(progress: Progress) -> None:
        try:
            callback(progress)
        # An error of its own kind: where it arises, others would be taken for a damaged file.
        except Exception as error:
            raise RequestError(
                f"the callback for progress raised {type(error).__name__}: {error}",
                hint="mend progress=, or leave it out",
            ) from error

    return report
