from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_core.adapters.residency.slots import AdapterSlots, Grant


def brought(slots, *keys):
    for key in keys:
        slots.request(key)
        slots.arrived(key)
    return slots


def test_the_least_recently_used_makes_room():
    slots = brought(AdapterSlots(2), "a", "b")
    assert slots.acquire("a")
    slots.release("a")

    assert slots.request("c") == Grant(evicted="b")


def test_one_in_use_or_on_its_way_or_pinned_stays():
    slots = brought(AdapterSlots(3), "used", "pinned")
    assert slots.acquire("used")
    assert slots.pin("pinned")
    assert slots.request("coming") == Grant()

    assert slots.request("more") is None

    assert set(slots) == {"used", "pinned", "coming"}


def test_nobody_enters_before_it_has_arrived():
    slots = AdapterSlots(1)

    assert not slots.acquire("a")
    slots.request("a")
    assert not slots.acquire("a")
    slots.arrived("a")

    assert slots.acquire("a")


def test_a_claimed_one_takes_on_no_more_until_the_next_round():
    slots = brought(AdapterSlots(2), "busy", "idle soon")
    for key in ("busy", "busy", "idle soon"):
        assert slots.acquire(key)

    assert slots.request("late") is None

    assert slots.acquire("busy")
    assert not slots.acquire("idle soon")
    slots.share("idle soon")  # beside a user that is there already
    slots.start_plan()
    assert slots.acquire("idle soon")


def test_one_place_is_always_left_for_others():
    slots = AdapterSlots(2)

    assert slots.pin("a")
    assert not slots.pin("b")
    slots.pin("a", False)
    assert slots.pin("b")


def test_one_that_cannot_come_gives_its_place_back():
    slots = AdapterSlots(1)
    slots.request("broken")

    slots.failed("broken")

    assert slots.request("next") == Grant()


def test_a_retired_one_leaves_with_its_last_user():
    slots = brought(AdapterSlots(), "a")
    assert slots.acquire("a")
    assert slots.acquire("a")
    slots.retire("a")

    slots.release("a")
    assert "a" in slots
    slots.release("a")

    assert "a" not in slots


def test_what_is_offered_takes_a_free_place_and_no_other():
    slots = AdapterSlots(1)

    assert slots.offer("a")
    slots.arrived("a")
    assert not slots.offer("b")
    assert not slots.offer("a")  # it has one
    assert list(slots) == ["a"]


def test_there_is_at_least_one_slot():
    with pytest.raises(ValueError, match="at least one slot"):
        AdapterSlots(0)


@settings(max_examples=200)
@given(
    capacity=st.integers(1, 4),
    jobs=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=40),
    pinned=st.sets(st.integers(0, 6), max_size=2),
    late=st.integers(0, 3),
)
def test_everybody_gets_in_and_is_not_passed_for_ever(capacity, jobs, pinned, late):
    """Jobs `(key, rounds)` wait in order; endless further jobs of key 0 come behind them and may not keep them out."""
    slots = AdapterSlots(capacity)
    for key in pinned:
        slots.pin(str(key))
    waiting = [(str(key), rounds) for key, rounds in jobs]
    running, coming = [], {}
    for _ in range(60 * len(jobs)):
        for key in [key for key, rounds in coming.items() if not rounds]:
            slots.arrived(key)
        coming = {key: rounds - 1 for key, rounds in coming.items() if rounds}
        slots.start_plan()
        behind = ("0", 2)
        for job in [*waiting, behind]:
            key = job[0]
            if key not in slots and slots.request(key) is not None:
                coming[key] = late
            if slots.acquire(key):
                running.append(job)
                waiting = [other for other in waiting if other is not job]
        slots.check()
        for key, rounds in running:
            if rounds == 1:
                slots.release(key)
        running = [(key, rounds - 1) for key, rounds in running if rounds > 1]
        slots.check()
        if not waiting:
            return

    raise AssertionError(f"still waiting: {waiting}")
