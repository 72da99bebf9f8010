"""Who has a slot on the device.

Decides which adapter may come in, which one is evicted for it, and which busy one takes on no more sequences, to make room.
Plain bookkeeping, without tensors and without threads: the store sends the messages that follow from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Slot:
    holder: object  # what the key stands for, kept alive as long as it has the slot
    users: int = 0  # sequences that are being computed with it
    loading: bool = True
    retired: bool = False  # no request can name it any more
    reserved_for: str | None = None  # a key that waits for this slot until the next plan


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot was given; `evicted` is the key that lost it, None when one was available."""

    evicted: str | None = None


class AdapterSlots:
    """Slots for `capacity` keys, any number when None.

    The least recently used is evicted first; one that is in use, still loading or pinned stays. A key that finds every slot in
    use reserves one: until the next plan its holder keeps the sequences that it has and takes on no more, so it empties.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"at least one slot is needed, not {capacity}")
        self.capacity = capacity
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._slots))

    def __len__(self) -> int:
        return len(self._slots)

    def start_plan(self) -> None:
        """Reservations are made again, in the order in which keys ask."""
        for slot in self._slots.values():
            slot.reserved_for = None

    def ready(self, key: str) -> bool:
        """Whether a key has a slot and has arrived there."""
        return key in self._slots and not self._slots[key].loading

    def acquire(self, key: str) -> bool:
        """One more user of a key that has arrived; False when it has no slot yet or must not take on more."""
        # A reserved slot takes no new users, or a busy adapter would never empty and the waiting key starve.
        if not self.ready(key) or self._slots[key].reserved_for is not None:
            return False
        self.share(key)
        return True

    def share(self, key: str) -> None:
        """One more user beside another, reserved or not."""
        self._slots[key].users += 1
        self._slots.move_to_end(key)

    def release(self, key: str) -> None:
        """One user less."""
        slot = self._slots[key]
        assert slot.users > 0, f"{key!r} was released more often than acquired"
        slot.users -= 1
        self._leave(key, slot)

    def request(self, key: str, holder: object = None) -> Grant | None:
        """Ask for a slot for a key that has none. None when none can be had now; then one is reserved."""
        assert key not in self._slots, f"{key!r} has a slot"
        evicted = None
        if self._full:
            evicted = next((old for old in self._slots if self._idle(old)), None)
            if evicted is None:
                self._reserve(key)
                return None
            del self._slots[evicted]
        self._slots[key] = _Slot(holder)
        return Grant(evicted)

    def offer(self, key: str, holder: object = None) -> bool:
        """Give a key a slot to load into if one is available, evicting none. False when it has to wait, or has one already.

        A key that was retired counts as named again.
        """
        if key in self._slots:
            self._slots[key].retired = False
            return False
        if self._full:
            return False
        self._slots[key] = _Slot(holder)
        return True

    def arrived(self, key: str) -> None:
        """It is on the device. No-op for one that is not expected any more."""
        slot = self._slots.get(key)
        if slot is not None:
            slot.loading = False
            self._leave(key, slot)

    def failed(self, key: str) -> None:
        """It did not arrive: its slot is available again."""
        self._slots.pop(key, None)

    def retire(self, key: str) -> None:
        """No request can name it any more: its slot is available once its users have been released."""
        self._pinned.discard(key)
        slot = self._slots.get(key)
        if slot is not None:
            slot.retired = True
            self._leave(key, slot)

    def pin(self, key: str, pinned: bool = True) -> bool:
        """Never evict a key, or allow it again. False when that would leave no slot for others."""
        if not pinned:
            self._pinned.discard(key)
            return True
        # One slot must stay free to change hands, or adapters that are not pinned would wait for ever.
        if self.capacity is not None and len(self._pinned | {key}) >= self.capacity:
            return False
        self._pinned.add(key)
        return True

    def check(self) -> None:
        """Prove the invariants; AssertionError otherwise."""
        assert self.capacity is None or len(self._slots) <= self.capacity, "more keys than slots"
        assert self.capacity is None or len(self._pinned) < self.capacity, "every slot is pinned"
        for key, slot in self._slots.items():
            assert slot.users >= 0, f"{key!r} has {slot.users} users"
            assert not (slot.loading and slot.users), f"{key!r} is used before it arrived"
            assert not slot.retired or slot.users or slot.loading, f"{key!r} is retired, idle, and still here"

    @property
    def _full(self) -> bool:
        return self.capacity is not None and len(self._slots) >= self.capacity

    def _leave(self, key: str, slot: _Slot) -> None:
        if slot.retired and not slot.users and not slot.loading:
            del self._slots[key]

    def _idle(self, key: str) -> bool:
        slot = self._slots[key]
        return not slot.users and not slot.loading and key not in self._pinned

    def _reserve(self, key: str) -> None:
        # One slot a key and plan: a second would empty two adapters for one.
        if any(slot.reserved_for == key for slot in self._slots.values()):
            return
        busy = [
            slot
            for old, slot in self._slots.items()
            if slot.users and old not in self._pinned and slot.reserved_for is None
        ]
        if busy:  # the one that is empty soonest; of equals the least recently used
            min(busy, key=lambda slot: slot.users).reserved_for = key
