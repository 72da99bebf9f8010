"""Who has a place on the device.

Decides which adapter may come in, which one makes room for it, and for whom a busy one is kept from taking on more work. Pure
books, without tensors and without threads: the store moves what they say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Place:
    users: int = 0  # sequences that are being computed with it
    loading: bool = True
    retired: bool = False  # nobody can name it any more


@dataclass(frozen=True, slots=True)
class Grant:
    """A place was given; `evicted` is the key that lost it, None when one was free."""

    evicted: str | None = None


class Places:
    """Places for `capacity` keys, any number when None.

    The least recently used leaves first; one that is in use, still loading or pinned stays. A key that finds every place in
    use claims one: until the next round its holder serves who is there already and lets nobody else in, so it empties.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"at least one place is needed, not {capacity}")
        self.capacity = capacity
        self._places: OrderedDict[str, _Place] = OrderedDict()  # least recently used first
        self._pinned: set[str] = set()
        self._claimed: dict[str, str] = {}  # who is claimed, by whom

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def start_round(self) -> None:
        """Claims are made anew, in the order in which keys ask."""
        self._claimed.clear()

    def enter(self, key: str) -> bool:
        """One more user of a key that has arrived; False when it has no place yet or must not take on more."""
        place = self._places.get(key)
        if place is None or place.loading or key in self._claimed:
            return False
        self.share(key)
        return True

    def share(self, key: str) -> None:
        """One more user beside another, claimed or not."""
        self._places[key].users += 1
        self._places.move_to_end(key)

    def leave(self, key: str) -> None:
        """One user less."""
        place = self._places[key]
        assert place.users > 0, f"more users left {key!r} than entered"
        place.users -= 1
        if place.retired and not place.users:
            self._remove(key)

    def want(self, key: str) -> Grant | None:
        """Ask for a place for a key that has none. None when none can be had now; then one is claimed."""
        assert key not in self._places, f"{key!r} has a place"
        evicted = None
        if self.capacity is not None and len(self._places) >= self.capacity:
            evicted = next((old for old in self._places if self._idle(old)), None)
            if evicted is None:
                self._claim(key)
                return None
            self._remove(evicted)
        self._places[key] = _Place()
        return Grant(evicted)

    def arrived(self, key: str) -> None:
        """It is on the device. No-op for one that is not expected any more."""
        place = self._places.get(key)
        if place is not None:
            place.loading = False
            if place.retired and not place.users:
                self._remove(key)

    def failed(self, key: str) -> None:
        """It did not arrive, and gives its place back."""
        self._places.pop(key, None)

    def offer(self, key: str) -> bool:
        """Give a key that is on the device already a place, if one is free; nobody makes room for it."""
        if key not in self._places:
            if self.capacity is not None and len(self._places) >= self.capacity:
                return False
            self._places[key] = _Place(loading=False)
        place = self._places[key]
        place.retired = False
        return not place.loading

    def retire(self, key: str) -> None:
        """Nobody can name it any more: its place is free once its users have left."""
        self._pinned.discard(key)
        place = self._places.get(key)
        if place is None:
            return
        place.retired = True
        if not place.users and not place.loading:
            self._remove(key)

    def pin(self, key: str, pinned: bool = True) -> bool:
        """Keep a key once it is here, or no longer. False when that would leave no place for others."""
        if not pinned:
            self._pinned.discard(key)
            return True
        if self.capacity is not None and len(self._pinned | {key}) >= self.capacity:
            return False
        self._pinned.add(key)
        return True

    def is_pinned(self, key: str) -> bool:
        """Whether the key stays once it is here."""
        return key in self._pinned

    def check(self) -> None:
        """Prove the invariants; AssertionError otherwise."""
        assert self.capacity is None or len(self._places) <= self.capacity, "more keys than places"
        assert self.capacity is None or len(self._pinned) < self.capacity, "every place is pinned"
        for key, place in self._places.items():
            assert place.users >= 0, f"{key!r} has {place.users} users"
            assert not (place.loading and place.users), f"{key!r} is used before it arrived"
            assert not place.retired or place.users or place.loading, f"{key!r} is retired, idle, and still here"
        assert set(self._claimed) <= set(self._places), "a claimed key has no place"

    def _idle(self, key: str) -> bool:
        place = self._places[key]
        return not place.users and not place.loading and key not in self._pinned

    def _claim(self, key: str) -> None:
        if key in self._claimed.values():
            return
        busy = [
            old
            for old, place in self._places.items()
            if place.users and old not in self._pinned and old not in self._claimed
        ]
        if busy:  # the one that is empty soonest; of equals the one that came longest ago
            self._claimed[min(busy, key=lambda old: self._places[old].users)] = key

    def _remove(self, key: str) -> None:
        del self._places[key]
        self._claimed.pop(key, None)
