"""A checkpoint with an adapter in its weights, as it is read.

Decides nothing of its own: it is the base's files, and the tensors that a plan changes are made when they are asked for, one
at a time. Loading it takes no more memory than loading the base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lorax_core.adapters.merging.plan import MergePlan, read_mergeable
from lorax_core.errors import LOAD_AGAIN, AdapterError
from lorax_core.plugins.host import PluginHost
from lorax_core.untrusted import guarded
from lorax_core.weights.checkpoint import Checkpoint


class MergedCheckpoint(Checkpoint):
    """`base` with the `adapter` in a folder merged; `notes` say what is otherwise than in the base.

    Tensors that change are in float32, so that they are rounded once, to the dtype that is computed with.

    Raises AdapterError for an adapter that is bad, or has a part without a place in the base.
    """

    def __init__(self, base: Checkpoint, adapter: Path, host: PluginHost) -> None:
        self.adapter = adapter
        self._base, self._host = base, host
        self._plan: MergePlan | None = self._planned()
        self._identity = self._plan.files.identity()
        # Not read again: what is planned is for these files.
        self.path, self.files, self.adapter = base.path, base.files, adapter
        self.config = self._plan.config
        self.tensors = self._plan.headers
        self.notes = tuple(self._plan.notes)

    def reader(self) -> Callable[[str], Tensor]:
        plan = self._plan
        if plan is None:
            plan = self._planned()
            if plan.files.identity() != self._identity:
                raise AdapterError(f"the files in {self.adapter} are not those that were merged", hint=LOAD_AGAIN)
        read = self._base.reader()
        return lambda name: plan.tensor(name, read) if name in plan.changes else read(name)

    def release(self) -> None:
        """Keep no tensors of the adapter: the few that are asked for once a model is loaded are read again."""
        self._plan = None

    def _planned(self) -> MergePlan:
        hint = "`lorax adapters inspect SOURCE` shows what its files hold"
        with guarded(AdapterError, f"{self.adapter} was not merged", hint):
            return MergePlan.of(self._base, read_mergeable(self.adapter), self._host, rounded=False)
