"""The outcome of a check.

Decides when a measurement passes and how a result is written as JSON. Knows nothing of models, tensors or pytest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class CheckStatus(StrEnum):
    """The outcome of a check.

    - `passed`, `failed`;
    - `known`: failed, as `known_failures` says it would (one that passes all the same is `failed`);
    - `badly-conditioned`: not judged, for the reference itself loses too much to rounding; the variant must change;
    - `skipped`: it does not apply, or the named attention backend does not support the variant; `detail` says why.
    """

    PASSED = "passed"
    FAILED = "failed"
    KNOWN = "known"
    BADLY_CONDITIONED = "badly-conditioned"
    SKIPPED = "skipped"


class CheckFailed(Exception):
    """Raised inside a check: what is wrong, where no number can say it."""


class BadlyConditioned(Exception):
    """Raised inside a check that cannot tell mistakes from rounding: how much the reference itself loses."""

    REMEDY = "give this variant a smaller initializer_range (0.2 unless stated), fewer layers or narrower heads"

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.REMEDY}"


class NotApplicable(Exception):
    """Raised inside a check that finds out, while it runs, that it does not apply to the variant."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The largest error of a check. `note` says where, or what was compared.

    `error` and `tolerance` are in the same unit, in most checks a share of the largest number of the reference. Both are
    None for a check without a number, which passes unless it raises.
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
class CheckResult:
    """The result of one check on one variant (None: on the architecture).

    `refused` marks a check that was skipped because the named attention backend does not support the variant.
    """

    check: str
    variant: str | None
    status: CheckStatus
    detail: str = ""
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0
    refused: bool = False

    @property
    def ratio(self) -> float | None:
        """Error over tolerance: above one is too much. None where nothing was measured."""
        if self.error is None or self.tolerance is None:
            return None
        # Compared bit for bit; a ratio has no meaning but for equal and not.
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.tolerance

    @property
    def excess(self) -> str:
        """How far beyond the tolerance, in words; empty where it is not."""
        return "" if self.ratio is None or self.ratio <= 1 else f"the error is {self.ratio:.3g} times the tolerance"

    @property
    def key(self) -> str:
        """The check and its variant, as `known_failures` may name them: `masking[sliding]`."""
        return self.check if self.variant is None else f"{self.check}[{self.variant}]"

    def to_json(self) -> dict[str, Any]:
        """Plain data; a number that is not finite, which JSON cannot express, becomes null (`detail` has it)."""
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
