"""How these tests behave: as all of the house."""

from __future__ import annotations

from house import one_thread, settle

__all__ = ["one_thread"]

settle()
