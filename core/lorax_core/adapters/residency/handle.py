"""The one record of an adapter's content.

Decides what is known of an adapter wherever it is: its facts always, its tensors in host memory or, when those were dropped,
the folder that they are read from again. Knows nothing of names or of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorax_core.adapters.base import Adapter, Bound, Fit
from lorax_core.adapters.formats.head import HeadRequest
from lorax_core.adapters.formats.medusa import read_adapter
from lorax_core.adapters.residency.source import FoundAdapter
from lorax_core.errors import AdapterError
from lorax_core.modeling.heads import Head
from lorax_core.types import Task


@dataclass(slots=True, eq=False, weakref_slot=True)
class AdapterHandle:
    """What sequences hold of an adapter: it stays usable for them, whatever happens to its name.

    `head` has the labels and spans of the adapter's own head, without numbers. The other fields are the store's: `adapter` is
    the copy in host memory, `folder` where it can be read again, `members` those of a weighted sum with their weights,
    `names` how many names it has, `used` when it was last asked for, and `text` what reads and writes its text instead of the
    base's, opaque here.
    """

    identity: str
    kind: str
    task: Task | None
    ranks: tuple[int, ...]
    draft_tokens: int
    fit: Fit
    adapter: Adapter | None = None
    folder: Path | None = None
    request: HeadRequest | None = None
    members: tuple[tuple[AdapterHandle, float], ...] = ()
    names: int = 0
    used: int = 0
    text: object = None

    @classmethod
    def of(
        cls, adapter: Adapter, fit: Fit, folder: Path | None = None, request: HeadRequest | None = None
    ) -> AdapterHandle:
        """The handle of an adapter in host memory."""
        facts = (adapter.identity, adapter.kind, adapter.task, adapter.ranks, adapter.draft_tokens)
        return cls(*facts, fit, adapter, folder, request)

    @classmethod
    def sum_of(cls, identity: str, members: list[tuple[AdapterHandle, float]]) -> AdapterHandle:
        """The handle of a weighted sum, whose members only add low-rank products."""
        tasks = {member.task for member, _ in members}
        targets = tuple(dict.fromkeys(path for member, _ in members for path in member.fit.targets))
        fit = Fit(targets, sum(member.fit.nbytes for member, _ in members), None, None)
        task = tasks.pop() if len(tasks) == 1 else None
        text = members[0][0].text  # where all agree; equal files share what is made of them
        agreed = text if all(member.text is text for member, _ in members) else None
        return cls(identity, "stack", task, (), 0, fit, members=tuple(members), text=agreed)

    @property
    def head(self) -> Head | None:
        """The adapter's own head on the meta device; None where the base's is used."""
        return self.fit.head

    def read(self) -> Adapter:
        """The adapter, from host memory or from its folder; raises AdapterError when the files are not what they were."""
        if self.adapter is not None:
            return self.adapter
        assert self.folder is not None, "a handle has an adapter or a folder"
        adapter = read_adapter(self.folder, self.request)
        # Sequences that are under way were promised the content loaded first, whatever the folder holds now.
        if adapter.identity != self.identity:
            raise AdapterError(
                f"the files in {self.folder} are not those that were loaded",
                hint="load the adapter again, under its name",
            )
        return adapter


def labels_of(head: Head | None) -> tuple[str, ...]:
    """The labels of a head for classification; none of another one."""
    return getattr(head, "labels", ())


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known of a loaded adapter.

    `targets` are module paths of the base; `unread` are modules that it changes and no loaded task reads; `nbytes` is on the
    device; `where` is "device", "memory" or "disk"; `revision` is what a remote source was at loading. `labels` are those of
    its own head, where it brings one.
    """

    name: str
    kind: str
    identity: str
    source: str
    task: str | None
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    unread: tuple[str, ...]
    nbytes: int
    where: str
    pinned: bool
    revision: str | None
    labels: tuple[str, ...]

    @classmethod
    def of(
        cls, name: str, handle: AdapterHandle, found: FoundAdapter, bound: Bound | None, pinned: bool
    ) -> AdapterInfo:
        """What is known of `handle` under this name; `bound` is what the device holds of it."""
        return cls(
            name=name,
            kind=handle.kind,
            identity=handle.identity,
            source=found.origin,
            task=handle.task.value if handle.task is not None else None,
            ranks=handle.ranks,
            targets=handle.fit.targets,
            unread=handle.fit.unread,
            nbytes=bound.nbytes if bound is not None else 0,
            where="device" if bound is not None else "memory" if handle.adapter is not None else "disk",
            pinned=pinned,
            revision=found.revision,
            labels=labels_of(handle.head),
        )
