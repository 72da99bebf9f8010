"""The adapters of one engine, by name.

Decides what a name means now, and moves adapters between the disk, host memory and the device as `places` says. Two names for
one content share one adapter; unloading forgets a name, while sequences keep the object that they started with.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from lorax_core.adapters.base import Adapter, FileAdapter
from lorax_core.adapters.formats.head import HeadRequest
from lorax_core.adapters.formats.medusa import read_adapter
from lorax_core.adapters.residency.slots import Places
from lorax_core.adapters.residency.source import find_adapter
from lorax_core.adapters.stack import StackedAdapter
from lorax_core.errors import AdapterError, LoraxError, listed, nearest
from lorax_core.kernels.native.low_rank import load_native
from lorax_core.weights.loader import LoadedModel

_RECENT_STACKS = 8
"""Weighted sums that are kept for the next request where nothing limits the adapters on the device."""

Listener = Callable[[Adapter, LoraxError | None], None]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What the store tells of a loaded adapter.

    `targets` are module paths of the base; `nbytes` is on the device; `where` is "device", "memory" or "disk"; `revision` is
    what a remote source was at loading.
    """

    name: str
    kind: str
    identity: str
    source: str
    task: str | None
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    nbytes: int
    where: str
    pinned: bool
    revision: str | None


@dataclass(frozen=True, slots=True)
class _Entry:
    adapter: FileAdapter
    source: str
    revision: str | None
    pinned: bool


class AdapterStore:
    """Named adapters over one base. Safe to call from any thread.

    `max_adapters` of them are on the device at once, all when None. The least recently used makes room, pinned ones stay,
    and one that a sequence computes with is never taken away. Of those that were on the device, the `max_cpu_adapters` last
    used keep a copy in host memory (four times `max_adapters` when None); the others are read from their source again.

    The engine asks `enter` for each sequence that is to run. An adapter that is not there is brought by a thread of the store,
    beside the running steps, and `listener` is told.
    """

    def __init__(
        self, base: LoadedModel, *, max_adapters: int | None = None, max_cpu_adapters: int | None = None
    ) -> None:
        for option, value, least in (("max_adapters", max_adapters, 1), ("max_cpu_adapters", max_cpu_adapters, 0)):
            if value is not None and value < least:
                raise AdapterError(f"{option} must be at least {least}, not {value}")
        if max_adapters is None and max_cpu_adapters is not None:
            raise AdapterError(
                "max_cpu_adapters needs max_adapters: without it every adapter stays on the device", hint="give both"
            )
        self.listener: Listener | None = None
        self._base = base
        self._entries: dict[str, _Entry] = {}
        self._names: Counter[str] = Counter()  # how many names an identity has
        self._places = Places(max_adapters)
        self._bound: dict[str, Adapter] = {}  # those with a place, by identity
        self._known: WeakValueDictionary[str, Adapter] = WeakValueDictionary()  # those that anybody still holds
        self._copies: OrderedDict[str, FileAdapter] = OrderedDict()  # in host memory, least recently used first
        self._max_copies = (
            0 if max_adapters is None else 4 * max_adapters if max_cpu_adapters is None else max_cpu_adapters
        )
        self._stacks: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.RLock()
        self._finding: dict[str, threading.Lock] = {}
        self._carrier: ThreadPoolExecutor | None = None
        self._fetcher: ThreadPoolExecutor | None = None
        self._closed = False

    def load(
        self,
        name: str,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        task: str | None = None,
        problem_type: str | None = None,
        id2label: Mapping[int, str] | None = None,
        pin: bool = False,
    ) -> AdapterInfo:
        """Find, read and check the adapter in `source` and call it `name`, in place of what had that name.

        - `source`: a folder, a hub id (with `revision` and `token`), or the URL of a folder (`s3://bucket/key`).
        - `task`, `problem_type` and `id2label` say of its head what its files do not; unnamed labels are `LABEL_i`.
        - `pin`: once on the device it stays there.

        Raises AdapterError, with the engine unharmed, when the files are bad or do not fit the base.
        """
        if not isinstance(name, str) or not name.strip():
            raise AdapterError(f"an adapter's name must be a non-empty string, not {name!r}")
        wanted = HeadRequest.of(task, problem_type, id2label)
        found = find_adapter(source, revision=revision, token=token)
        adapter: FileAdapter = read_adapter(found.folder, wanted)
        with self._lock:
            known = self._known.get(adapter.identity)
        load_native()  # what may have to be compiled is so here, and not in the first step that needs it
        if known is None:
            adapter.bind(self._base)  # beside the running engine; this is also the check that it fits
        with self._lock:
            if pin and not self._places.pin(adapter.identity):
                raise AdapterError(
                    f"{name!r} cannot be pinned: of {self._places.capacity} places on the device one must be left for others",
                    hint="load the engine with a larger max_adapters, or pin fewer",
                )
            adapter = self._admitted(adapter)
            before = self._entries.pop(name, None)
            self._entries[name] = _Entry(adapter, found.origin, found.revision, pin)
            self._names[adapter.identity] += 1
            if before is not None:
                self._forget(before)
            return self._info(name)

    def unload(self, name: str) -> None:
        """Forget `name`; raises AdapterError when nothing is called so."""
        with self._lock:
            entry = self._find(name)
            del self._entries[name]
            self._forget(entry)

    def list(self) -> list[AdapterInfo]:
        """What is loaded, by name."""
        with self._lock:
            return [self._info(name) for name in sorted(self._entries)]

    def get(self, wanted: str | Mapping[str, float]) -> Adapter:
        """The adapter of this name now, or the weighted sum of several.

        A name that is a source (it has a slash) and is not known yet is loaded under that name. Raises AdapterError with the
        nearest name otherwise.
        """
        if isinstance(wanted, str):
            return self._named(wanted)
        if not wanted:
            raise AdapterError("a weighted sum of adapters needs at least one", hint="adapter={'a': 0.7, 'b': 0.3}")
        for name, weight in wanted.items():
            if not math.isfinite(weight):
                raise AdapterError(f"adapter {name!r} has weight {weight}, which is no finite number")
        members = [(self._named(name), float(weight)) for name, weight in wanted.items()]
        if len(members) == 1 and members[0][1] == 1.0:
            return members[0][0]
        return self._stacked(StackedAdapter(members))

    @property
    def bound(self) -> Mapping[str, Adapter]:
        """The adapters on the device, by identity."""
        return self._bound

    def missing(self, wanted: str | Mapping[str, float] | None) -> list[str]:
        """Names among the wanted ones that are sources not loaded yet; AdapterError for plain names that nothing has."""
        names = [] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
        with self._lock:
            unknown = [name for name in names if name not in self._entries]
            for name in unknown:
                if not _is_source(name):
                    self._find(name)
            return unknown

    def fetch(self, names: Iterable[str]) -> Future[None]:
        """Load sources under their own names, beside the running engine; the future ends when all are there."""
        with self._lock:
            if self._fetcher is None:
                self._fetcher = ThreadPoolExecutor(4, thread_name_prefix="lorax-fetch")
            return self._fetcher.submit(lambda chosen: [self._named(name) for name in chosen] and None, list(names))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def start_plan(self) -> None:
        """The scheduler begins a plan, and will ask for adapters in the order of its queue."""
        with self._lock:
            self._places.start_round()

    def acquire(self, adapter: Adapter) -> bool:
        """Hold an adapter on the device for one more sequence; False while it is not there, and then it is on its way."""
        key = adapter.identity
        with self._lock:
            if self._closed:
                return False
            if key not in self._places:
                self._bring(adapter)
            if key in self._copies:
                self._copies.move_to_end(key)
            return self._places.enter(key)

    def share(self, adapter: Adapter) -> None:
        """Hold an adapter once more, beside a sequence that holds it."""
        with self._lock:
            self._places.share(adapter.identity)

    def release(self, adapter: Adapter) -> None:
        """One sequence less computes with the adapter."""
        with self._lock:
            self._places.leave(adapter.identity)
            self._let_go(adapter.identity)

    def close(self) -> None:
        """Bring nothing any more. Idempotent."""
        with self._lock:
            self._closed = True
            carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Prove the invariants between books and adapters; AssertionError otherwise."""
        with self._lock:
            self._places.check()
            assert set(self._bound) <= set(self._places), "an adapter without a place is held"
            assert all(adapter.is_bound for adapter in self._bound.values()), "an adapter has a place and is not there"
            assert len(self._copies) <= self._max_copies, "more copies in host memory than allowed"
            holders = {entry.adapter.identity for entry in self._entries.values() if entry.adapter.holds_files}
            assert holders <= set(self._copies), "a copy in host memory is not counted"

    def _named(self, name: str) -> FileAdapter:
        with self._lock:
            known = self._entries.get(name)
            if known is not None or not _is_source(name):
                return (known or self._find(name)).adapter
            finding = self._finding.setdefault(name, threading.Lock())
        with finding:  # of many requests that name it, one loads
            with self._lock:
                known = self._entries.get(name)
            try:
                if known is None:
                    self.load(name, name)
            finally:
                with self._lock:
                    self._finding.pop(name, None)
        with self._lock:
            return self._find(name).adapter

    def _admitted(self, adapter: FileAdapter) -> FileAdapter:
        """The one object of this content: `adapter`, or its twin that somebody holds already."""
        key = adapter.identity
        twin = self._known.setdefault(key, adapter)
        assert isinstance(twin, FileAdapter)
        twin.path = adapter.path  # the newest place where the content is known to be
        self._keep_copy(twin)
        if twin.is_bound:
            if self._places.offer(key):
                self._bound[key] = twin
            elif key not in self._places:  # every place is taken: it comes when a request asks
                twin.unbind()
        return twin

    def _stacked(self, stack: StackedAdapter) -> Adapter:
        with self._lock:
            known = self._known.setdefault(stack.identity, stack)
            if self._places.capacity is None:
                self._stacks[stack.identity] = known
                self._stacks.move_to_end(stack.identity)
                if len(self._stacks) > _RECENT_STACKS:
                    self._let_go(self._stacks.popitem(last=False)[0])
        return known

    def _bring(self, adapter: Adapter) -> None:
        """Ask for a place, and have the adapter carried there."""
        key = adapter.identity
        grant = self._places.want(key)
        if grant is None:
            return
        if grant.evicted is not None:
            self._bound.pop(grant.evicted).unbind()
        if adapter.is_bound:  # it was retired while sequences still waited for it
            self._arrived(adapter)
            return
        if self._carrier is None:
            self._carrier = ThreadPoolExecutor(1, thread_name_prefix="lorax-adapters")
        self._carrier.submit(self._carry, adapter)

    def _carry(self, adapter: Adapter) -> None:
        """Read and bind, beside the running engine: sites are filled one by one, and no step waits for them."""
        error: LoraxError | None = None
        try:
            adapter.bind(self._base)
        except LoraxError as failure:
            error = failure
        except Exception as failure:
            error = AdapterError(f"an adapter could not be brought back: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
        with self._lock:
            if error is None:
                self._arrived(adapter)
            else:
                self._places.failed(adapter.identity)
        if self.listener is not None:
            self.listener(adapter, error)

    def _arrived(self, adapter: Adapter) -> None:
        self._places.arrived(adapter.identity)
        if adapter.identity in self._places:
            self._bound[adapter.identity] = adapter
        for one in adapter.members if isinstance(adapter, StackedAdapter) else (adapter,):
            if isinstance(one, FileAdapter):
                self._keep_copy(one)

    def _keep_copy(self, adapter: FileAdapter) -> None:
        """Its copy in host memory is the last used; the oldest beyond the limit goes."""
        if adapter.holds_files:
            self._copies[adapter.identity] = adapter
            self._copies.move_to_end(adapter.identity)
        while len(self._copies) > self._max_copies:
            _, oldest = self._copies.popitem(last=False)
            oldest.forget_files()

    def _forget(self, entry: _Entry) -> None:
        """A name stopped meaning an adapter. Without another name it leaves once its sequences have."""
        key = entry.adapter.identity
        self._names[key] -= 1
        if not any(other.pinned for other in self._entries.values() if other.adapter is entry.adapter):
            self._places.pin(key, False)
        if not self._names[key]:
            del self._names[key]
            self._copies.pop(key, None)
        self._let_go(key)

    def _let_go(self, key: str) -> None:
        """Hold an adapter that nobody can ask for any more no longer than its sequences do; those that wait keep it."""
        stack = isinstance(self._bound.get(key), StackedAdapter)
        wanted = key in self._names or key in self._stacks or (stack and self._places.capacity is not None)
        if not wanted:
            self._places.retire(key)
        if key not in self._places:
            self._bound.pop(key, None)

    def _find(self, name: str) -> _Entry:
        found = self._entries.get(name)
        if found is None:
            close = nearest(str(name), self._entries)
            raise AdapterError(
                f"no adapter is called {name!r}; loaded are {listed(sorted(self._entries))}",
                hint=f"did you mean {close!r}?" if close else "load it with engine.adapters.load(name, folder)",
            )
        return found

    def _info(self, name: str) -> AdapterInfo:
        entry = self._entries[name]
        adapter = entry.adapter
        return AdapterInfo(
            name=name,
            kind=adapter.kind,
            identity=adapter.identity,
            source=entry.source,
            task=adapter.task.value if adapter.task is not None else None,
            ranks=adapter.ranks,
            targets=adapter.targets,
            nbytes=adapter.nbytes,
            where="device" if adapter.is_bound else "memory" if adapter.holds_files else "disk",
            pinned=entry.pinned,
            revision=entry.revision,
        )


def _is_source(name: str) -> bool:
    """Whether a name that is not known may be a folder, a hub id or a URL; plain names never are, so typos are told."""
    return "/" in name or "\\" in name
