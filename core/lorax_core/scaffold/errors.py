"""What stops the scaffold: something that a model computes, and core's blocks do not."""

from __future__ import annotations

from collections.abc import Sequence


class NotUnderstood(Exception):
    """A model computes something that core's blocks do not; `problems` says what was seen.

    For users it becomes a PluginError, in `make_package`.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
