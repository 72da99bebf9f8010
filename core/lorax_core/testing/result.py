"""What a check is, and what it says.

Decides when a measurement passes and how an outcome is written down. Knows nothing of models, tensors or pytest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax_core.plugins.spec import ArchitectureSpec
    from lorax_core.testing.case import Case


class Status(StrEnum):
    """The outcome of a check.

    - `passed`, `failed`;
    - `known`: failed, as the spec's `known_failures` says it would (one that passes all the same is `failed`);
    - `skipped`: it has nothing to say here, and why.
    """

    PASSED = "passed"
    FAILED = "failed"
    KNOWN = "known"
    SKIPPED = "skipped"


class CheckFailed(Exception):
    """Raised inside a check: what is wrong, where no number can say it."""


class NotApplicable(Exception):
    """Raised inside a check that finds out, while it runs, that it has nothing to say here."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The worst that a check saw. `note` says where, or what was looked at.

    `error` and `tolerance` are in the same unit, in most checks a share of the largest number of the reference. Both are
    None where the answer is yes or no; then having come here means yes.
    """

    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        if self.error is None or self.tolerance is None:
            return True
        return self.error <= self.tolerance  # never true of NaN


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is proven of an architecture.

    `pointless` says, from the declaration alone, why the check has nothing to say (None: it has). A check that runs `once`
    is of the architecture, not of a variant.
    """

    name: str
    proves: str
    run: Callable[[Case], Measured]
    pointless: Callable[[ArchitectureSpec], str | None] | None = None
    once: bool = False

    def applies(self, spec: ArchitectureSpec) -> bool:
        """Whether the check has anything to say of an architecture."""
        return self.pointless is None or self.pointless(spec) is None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of one check on one variant (None: of the architecture)."""

    check: str
    variant: str | None
    status: Status
    detail: str = ""
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Error over tolerance: above one is too much. None where nothing was measured."""
        if self.error is None or self.tolerance is None:
            return None
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.tolerance

    @property
    def excess(self) -> str:
        """How far beyond the tolerance, in words; empty where it is not."""
        return "" if self.ratio is None or self.ratio <= 1 else f"the error is {self.ratio:.3g} times the tolerance"

    @property
    def key(self) -> str:
        """The check and its variant, as `known_failures` may name them: `sight[sliding]`."""
        return self.check if self.variant is None else f"{self.check}[{self.variant}]"

    def to_json(self) -> dict[str, Any]:
        """Plain data; a number that is not finite, which JSON has no word for, becomes null (the detail tells)."""
        return {
            "check": self.check,
            "variant": self.variant,
            "status": str(self.status),
            "error": _finite(self.error),
            "tolerance": _finite(self.tolerance),
            "ratio": _finite(self.ratio),
            "detail": self.detail,
            "seconds": round(self.seconds, 4),
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
