"""The adapters of one engine, by name.

Decides what a name means now, and moves adapters between the disk, host memory and the device as the slots allow. Two names
for one content share one handle; unloading forgets a name, while sequences keep the handle that they started with. The model
is reached through messages alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lorax_core.adapters.base import Adapter
from lorax_core.adapters.bound import BindAdapter, BoundAdapters, UnbindAdapter
from lorax_core.adapters.formats.head import HeadRequest
from lorax_core.adapters.formats.medusa import read_adapter
from lorax_core.adapters.residency.fetching import Fetcher
from lorax_core.adapters.residency.handle import AdapterHandle, AdapterInfo
from lorax_core.adapters.residency.names import Named, NameTable, check_name
from lorax_core.adapters.residency.slots import AdapterSlots
from lorax_core.adapters.residency.source import FoundAdapter, masked
from lorax_core.adapters.residency.sources import AdapterSources
from lorax_core.adapters.stack import StackedAdapter, check_weights, stack_identity
from lorax_core.errors import LOAD_AGAIN, AdapterError, LoraxError, listed
from lorax_core.settings import Settings
from lorax_core.untrusted import guarded
from lorax_core.weights.loader import LoadedModel

_log = logging.getLogger(__name__)
_AGAIN = "`lorax adapters inspect SOURCE` shows what its files hold"
_RECENT_STACKS = 8
"""Weighted sums that are kept for the next request where nothing limits the adapters on the device."""

Listener = Callable[[AdapterHandle, LoraxError | None], None]
Choice = str | Mapping[str, float]
"""A name, or names with weights."""


class AdapterStore:
    """Named adapters over one base. Safe to call from any thread.

    `max_adapters` of them are on the device at once, all when None. The least recently used is evicted, but none that is pinned
    or computes. The `max_cpu_adapters` last used keep a copy in host memory (four times `max_adapters` when None). Of the
    sources that requests named, the `max_fetched` last used stay named.

    The scheduler calls `acquire` for each sequence that is to run. An adapter that is not on the device is bound by a thread of
    the store, beside the running steps; then `listener` is called. `bound` is what the device holds, by identity.
    """

    def __init__(
        self,
        base: LoadedModel,
        settings: Settings | None = None,
        *,
        max_adapters: int | None = None,
        max_cpu_adapters: int | None = None,
        max_fetched: int = 64,
        sources: AdapterSources | None = None,
    ) -> None:
        self.listener: Listener | None = None
        self.texts: Callable[[Path], object] = lambda _: None  # what reads an adapter's text, None for the base's
        self._settings = settings or Settings()
        self.bound = BoundAdapters(base, self._settings)
        self._base = base
        self._names = NameTable(max_fetched)
        self._sources = sources or AdapterSources(self._settings.cache)
        self._slots = AdapterSlots(max_adapters)
        self._handles: weakref.WeakValueDictionary[str, AdapterHandle] = weakref.WeakValueDictionary()
        self._max_copies = 4 * (max_adapters or 0) if max_cpu_adapters is None else max_cpu_adapters
        self._dropped: deque[str] = deque()  # identities of handles that nobody holds any more
        self._stacks: OrderedDict[str, AdapterHandle] = OrderedDict()
        self._clock = 0
        self._lock = threading.RLock()
        self._fetcher = Fetcher(self._fetch, self._sources)
        self._binder: ThreadPoolExecutor | None = None
        self._closed = False
        self.loads = self.evictions = 0
        """How often an adapter was brought to the device, and how often one made room there for another."""

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
        bounded: bool = False,
    ) -> AdapterInfo:
        """Find, read and check the adapter in `source` and call it `name`, in place of what had that name.

        - `source`: a folder, a hub id (with `revision` and `token`), or the URL of a folder (`s3://bucket/key`).
        - `task`, `problem_type`, `id2label` state of its head what its files do not. `pin`: once on the device it stays there.
        - `bounded`: it may be no larger than what requests bring (`max_adapter_bytes`).

        Raises AdapterError, with the engine unharmed, when the files are bad or do not fit the base.
        """
        check_name(name)
        for option, value, kind in (("revision", revision, str), ("token", token, str), ("pin", pin, bool)):
            if value is not None and not isinstance(value, kind):
                raise AdapterError(f"{option} is a {kind.__name__}, not a {type(value).__name__}", hint="leave it out")
        # The last net: what a library raises over bad files is one error here too.
        with guarded(AdapterError, f"{name!r:.200} was not loaded", _AGAIN):
            request = HeadRequest.of(task, problem_type, id2label)
            return self._load(name, self._sources.find(source, revision, token, bounded=bounded), request, pin=pin)

    def _load(
        self, name: str, found: FoundAdapter, request: HeadRequest, *, pin: bool = False, fetched: bool = False
    ) -> AdapterInfo:
        handle = self._read(found, request)
        with self._lock:
            if self._closed:
                raise AdapterError(f"{name!r} was not loaded: the engine is closed", hint=LOAD_AGAIN)
            if pin and not self._slots.pin(handle.identity):
                raise AdapterError(
                    f"{name!r} cannot be pinned: of {self._slots.capacity} slots on the device one must be left for others",
                    hint="load the engine with a larger max_adapters (--max-adapters), or pin fewer",
                )
            handle.names += 1
            offered = self._slots.offer(handle.identity, handle)
        error = self._bind(handle) if offered else None
        with self._lock:
            if error is not None:
                self._forget(handle)
                raise error
            self._keep_copies(handle)
            named = Named(handle, found, pin, fetched)
            for gone in self._names.put(name, named):
                self._forget(gone.handle)
            return self._info(name, named)

    def unload(self, name: str) -> None:
        """Forget `name`; raises AdapterError when there is none."""
        with self._lock:
            self._forget(self._names.remove(name).handle)

    def list(self) -> Sequence[AdapterInfo]:
        """What is loaded, by name."""
        with self._lock:
            return [self._info(*item) for item in self._names.items]

    def get(self, wanted: Choice) -> AdapterHandle:
        """The adapter of this name now, or the weighted sum of several. Never blocks.

        Raises AdapterError for a name that is not loaded, with the nearest one.
        """
        with self._lock:
            if isinstance(wanted, str):
                return self._names.find(wanted).handle
            check_weights(wanted)
            members = [(self._names.find(name).handle, float(weight)) for name, weight in wanted.items()]
            if len(members) == 1 and members[0][1] == 1.0:
                return members[0][0]
            for (member, _), name in zip(members, wanted, strict=True):
                if member.fit.not_a_sum is not None:
                    raise AdapterError(
                        f"{name!r} cannot be part of a weighted sum: it has {member.fit.not_a_sum}",
                        hint="name it alone; only plain low-rank updates can be added up",
                    )
            return self._stack(members)

    def missing(self, wanted: Choice) -> tuple[str, ...]:
        """The names among them that are sources (they have a slash) and are not loaded yet; `fetch` loads them.

        Raises AdapterError for other names that are not loaded, and for sources that requests may not name.
        """
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        with self._lock:
            absent = tuple(name for name in names if name not in self._names)
            for name in absent:
                if "/" not in name and "\\" not in name:
                    self._names.find(name)
        for name in absent:
            check_name(name)
            self._sources.check(name)
        return absent

    def fetch(self, names: Iterable[str]) -> Future[None]:
        """Load sources under their own names, in threads of the store. Of many requests for one name, one loads it.

        The future fails with an AdapterError when one cannot be loaded, or not in time.
        """
        return self._fetcher.fetch(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def start_plan(self) -> None:
        """The scheduler begins a plan, and will ask for adapters in the order of its queue."""
        with self._lock:
            self._free_dropped()
            self._slots.start_plan()

    def acquire(self, handle: AdapterHandle) -> bool:
        """Hold an adapter on the device for one more sequence; False while it is not there: then it is being bound."""
        with self._lock:
            if self._closed:
                return False
            if handle.identity not in self._slots:
                self._request(handle)
            self._touch(handle)
            return self._slots.acquire(handle.identity)

    def share(self, handle: AdapterHandle) -> None:
        """Hold an adapter once more, beside a sequence that holds it."""
        with self._lock:
            self._slots.share(handle.identity)

    def release(self, handle: AdapterHandle) -> None:
        """One sequence less computes with the adapter."""
        with self._lock:
            self._slots.release(handle.identity)
            self._retire(handle)

    def close(self) -> None:
        """Bind nothing any more, and fail what is being fetched. Idempotent."""
        with self._lock:
            self._closed = True
            binder, self._binder = self._binder, None
        self._fetcher.close(AdapterError("the engine was closed", hint=LOAD_AGAIN))
        if binder is not None:
            binder.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Prove the invariants between slots, names and the device; AssertionError otherwise."""
        with self._lock:
            self._slots.check()
            ready = {key for key in self._slots if self._slots.ready(key)}
            assert ready <= set(self.bound), "an adapter has a slot and is not on the device"
            named = self._names.handles
            kept = {key for key in self.bound if key in self._handles and key not in named}  # sequences wait for them
            assert set(self.bound) <= {*self._slots, *kept}, "an adapter without a slot is on the device"
            copies = sum(handle.adapter is not None for handle in named.values())
            assert copies <= self._max_copies, "more copies in host memory than allowed"

    def _read(self, found: FoundAdapter, request: HeadRequest) -> AdapterHandle:
        """The one handle of what was found, with its newest place; checked against the base when it is new."""
        # First by its headers: numbers that do not fit would take as much memory as the file's author likes.
        read_adapter(found.folder, request, shapes_only=True).check(self._base)
        adapter = read_adapter(found.folder, request)
        with self._lock:
            known = self._handles.get(adapter.identity)
        if known is None:
            known = AdapterHandle.of(adapter, adapter.check(self._base), found.folder, request)
            if unread := known.fit.unread:
                _log.warning("%s changes %s, which no loaded task reads", found.origin, listed(unread))
        text = self.texts(found.folder)
        with self._lock:
            known = self._kept(known)
            known.adapter, known.folder, known.request, known.text = adapter, found.folder, request, text
        return known

    def _kept(self, handle: AdapterHandle) -> AdapterHandle:
        """The one handle of its identity, whose memory on the device is freed when nobody holds it any more."""
        known = self._handles.setdefault(handle.identity, handle)
        if known is handle:
            weakref.finalize(handle, _drop, weakref.ref(self), handle.identity).atexit = False
        return known

    def _free_dropped(self) -> None:
        while self._dropped:
            identity = self._dropped.popleft()
            if identity not in self._handles:  # else the same content has been loaded again
                self.bound.handle(UnbindAdapter(identity))

    def _stack(self, members: Sequence[tuple[AdapterHandle, float]]) -> AdapterHandle:
        weights: dict[str, float] = {}
        for member, weight in members:
            weights[member.identity] = weights.get(member.identity, 0.0) + weight
        identity = stack_identity(weights)
        known = self._handles.get(identity)
        if known is None:
            handles = {member.identity: member for member, _ in members}
            known = self._kept(AdapterHandle.sum_of(identity, [(handles[key], weights[key]) for key in weights]))
        if self._slots.capacity is None:
            self._stacks[identity] = known
            self._stacks.move_to_end(identity)
            if len(self._stacks) > _RECENT_STACKS:
                self._retire(self._stacks.popitem(last=False)[1])
        return known

    def _request(self, handle: AdapterHandle) -> None:
        """Ask for a slot, and have the adapter bound there."""
        grant = self._slots.request(handle.identity, handle)
        if grant is None:
            return
        if grant.evicted is not None:
            self.evictions += 1
            self.bound.handle(UnbindAdapter(grant.evicted))
        if handle.identity in self.bound:  # it was retired while sequences still waited for it
            self._slots.arrived(handle.identity)
            return
        if self._binder is None:
            self._binder = ThreadPoolExecutor(1, thread_name_prefix="lorax-adapters")
        self._binder.submit(self._bind, handle)

    def _bind(self, handle: AdapterHandle) -> LoraxError | None:
        """Read and bind beside the running engine, whose steps do not wait; the error, when it failed."""
        error: LoraxError | None = None
        try:
            with contextlib.ExitStack() as held:
                self.bound.handle(BindAdapter(handle.identity, self._material(handle, held)))
        except LoraxError as failure:
            error = failure
        except BaseException as failure:  # also a panic of a Rust library: the slot must not stay in loading
            error = AdapterError(f"an adapter could not be bound: {type(failure).__name__}: {failure}", hint=_AGAIN)
            error.__cause__ = failure
        with self._lock:
            if error is None:
                self.loads += 1
                self._slots.arrived(handle.identity)
                for one in (handle, *(member for member, _ in handle.members)):
                    self._keep_copies(one)
            else:
                self._slots.failed(handle.identity)
        if self.listener is not None:
            self.listener(handle, error)
        return error

    def _material(self, handle: AdapterHandle, held: contextlib.ExitStack) -> Adapter:
        """The adapter itself, from memory or disk. Members of a sum that are on the device are held there meanwhile."""
        if not handle.members:
            handle.adapter = adapter = handle.read()
            return adapter
        members: dict[str, Adapter] = {}
        for member, _ in handle.members:
            with self._lock:
                there = self._slots.ready(member.identity)
                if there:
                    self._slots.share(member.identity)
                    held.callback(self.release, member)
            if not there:
                member.adapter = members[member.identity] = member.read()
        return StackedAdapter({one.identity: weight for one, weight in handle.members}, members, handle.task)

    def _touch(self, handle: AdapterHandle) -> None:
        self._clock += 1
        handle.used = self._clock

    def _keep_copies(self, handle: AdapterHandle) -> None:
        """The copy of this one in host memory is the last used; the oldest beyond the limit are dropped."""
        self._touch(handle)
        named = self._names.handles | {handle.identity: handle}
        copies = [one for one in named.values() if one.adapter is not None and one.names and one.folder is not None]
        copies.sort(key=lambda one: one.used)
        for oldest in copies[: max(len(copies) - self._max_copies, 0)]:
            oldest.adapter = None

    def _forget(self, handle: AdapterHandle) -> None:
        """A name stopped meaning an adapter. Without another name it leaves once its sequences have."""
        handle.names -= 1
        if not handle.names:  # no request can name a sum with this member again
            for stack in [one for one in self._stacks.values() if any(member is handle for member, _ in one.members)]:
                self._retire(self._stacks.pop(stack.identity))
        if not self._names.is_pinned(handle):
            self._slots.pin(handle.identity, False)
        self._retire(handle)

    def _retire(self, handle: AdapterHandle) -> None:
        """Free the slot of an adapter that no request can name any more once its sequences have left."""
        kept_sum = handle.members and (self._slots.capacity is not None or handle.identity in self._stacks)
        if not handle.names and not kept_sum:
            self._slots.retire(handle.identity)

    def _info(self, name: str, one: Named) -> AdapterInfo:
        return AdapterInfo.of(name, one.handle, one.found, self.bound.get(one.handle.identity), one.pinned)

    def _fetch(self, source: str) -> None:
        try:  # an error says nothing of files beside the one that a request names
            with guarded(AdapterError, f"{masked(source)!r:.200} was not loaded", _AGAIN):
                self._load(source, self._sources.find(source, bounded=True), HeadRequest(), fetched=True)
        except AdapterError as error:
            raise self._sources.unfit(error) from error


def _drop(store: weakref.ref[AdapterStore], identity: str) -> None:
    """Take an adapter off the device that nobody holds any more."""
    found = store()
    if found is None:
        return
    found._dropped.append(identity)
    # The garbage collector may run this in a thread that holds any lock, so it must not wait for one.
    if found._lock.acquire(blocking=False):
        try:
            found._free_dropped()
        finally:
            found._lock.release()
