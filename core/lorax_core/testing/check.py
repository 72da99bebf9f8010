"""What a check is: a name, what it proves, and the function that measures it.

Knows nothing of the plan, of results or of who shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.case import Case
from lorax_core.testing.result import Measured


@dataclass(frozen=True, slots=True)
class Check:
    """One property that the kit proves of an architecture.

    `inapplicable` says, from the declaration alone, why the check does not apply (None: it does). A check that runs `once`
    is about the architecture, not about a variant. One that is not `sized` cannot depend on which size heads have: of the sizes
    that the kit adds, it runs on the first alone.
    """

    name: str
    proves: str
    run: Callable[[Case], Measured]
    inapplicable: Callable[[ArchitectureSpec], str | None] | None = None
    once: bool = False
    sized: bool = True

    def applies(self, spec: ArchitectureSpec) -> bool:
        """Whether the check applies to an architecture."""
        return self.inapplicable is None or self.inapplicable(spec) is None
