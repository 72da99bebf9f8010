"""The conformance kit: proof that a plugin's architecture is right, for its author and for us.

Decides which names an author may rely on. Each is imported when first used: naming this package imports neither torch nor
pytest. `docs/conformance.md` is the contract in words.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "BadlyConditioned": "result",
    "Check": "check",
    "CheckFailed": "result",
    "CheckResult": "result",
    "Measured": "result",
    "NotApplicable": "result",
    "CheckStatus": "result",
    "Suite": "suite",
    "conformance": "under_pytest",
    "run_checks": "suite",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from lorax_core.testing.check import Check as Check
    from lorax_core.testing.result import BadlyConditioned as BadlyConditioned
    from lorax_core.testing.result import CheckFailed as CheckFailed
    from lorax_core.testing.result import CheckResult as CheckResult
    from lorax_core.testing.result import CheckStatus as CheckStatus
    from lorax_core.testing.result import Measured as Measured
    from lorax_core.testing.result import NotApplicable as NotApplicable
    from lorax_core.testing.suite import Suite as Suite
    from lorax_core.testing.suite import run_checks as run_checks
    from lorax_core.testing.under_pytest import conformance as conformance


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # found from now on without this function
    return value
