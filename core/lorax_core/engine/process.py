"""Which process an engine lives in.

Decides that a forked child does not use what it inherited: it has the locks of its parent's threads, maybe held, and none of
the threads. Knows nothing of engines.
"""

from __future__ import annotations

import os

from lorax_core.errors import RequestError


class OwnProcess:
    """The process in which it was made."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises RequestError in any other process. Call it before any lock is taken."""
        if not self.here:
            raise RequestError(
                f"the engine was loaded in process {self._pid}; this is its forked child {os.getpid()}, which has no thread "
                "to compute it",
                hint="load the engine in the child, or start processes with the method 'spawn'",
            )
