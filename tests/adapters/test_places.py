from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_core.adapters.residency.slots import Grant, Places


def brought(places, *keys):
    for key in keys:
        places.want(key)
        places.arrived(key)
    return places


def test_the_least_recently_used_makes_room():
    places = brought(Places(2), "a", "b")
    assert places.enter("a")
    places.leave("a")

    assert places.want("c") == Grant(evicted="b")


def test_one_in_use_or_on_its_way_or_pinned_stays():
    places = brought(Places(3), "used", "pinned")
    assert places.enter("used")
    assert places.pin("pinned")
    assert places.want("coming") == Grant()

    assert places.want("more") is None

    assert set(places) == {"used", "pinned", "coming"}


def test_nobody_enters_before_it_has_arrived():
    places = Places(1)

    assert not places.enter("a")
    places.want("a")
    assert not places.enter("a")
    places.arrived("a")

    assert places.enter("a")


def test_a_claimed_one_takes_on_no_more_until_the_next_round():
    places = brought(Places(2), "busy", "idle soon")
    for key in ("busy", "busy", "idle soon"):
        assert places.enter(key)

    assert places.want("late") is None

    assert places.enter("busy")
    assert not places.enter("idle soon")
    places.share("idle soon")  # beside a user that is there already
    places.start_round()
    assert places.enter("idle soon")


def test_one_place_is_always_left_for_others():
    places = Places(2)

    assert places.pin("a")
    assert not places.pin("b")
    places.pin("a", False)
    assert places.pin("b")


def test_one_that_cannot_come_gives_its_place_back():
    places = Places(1)
    places.want("broken")

    places.failed("broken")

    assert places.want("next") == Grant()


def test_a_retired_one_leaves_with_its_last_user():
    places = brought(Places(), "a")
    assert places.enter("a")
    assert places.enter("a")
    places.retire("a")

    places.leave("a")
    assert "a" in places
    places.leave("a")

    assert "a" not in places


def test_what_is_offered_takes_a_free_place_and_no_other():
    places = Places(1)

    assert places.offer("a")
    assert not places.offer("b")
    assert list(places) == ["a"]


def test_there_is_at_least_one_place():
    with pytest.raises(ValueError, match="at least one place"):
        Places(0)


@settings(max_examples=200)
@given(
    capacity=st.integers(1, 4),
    jobs=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=40),
    pinned=st.sets(st.integers(0, 6), max_size=2),
    late=st.integers(0, 3),
)
def test_everybody_gets_in_and_is_not_passed_for_ever(capacity, jobs, pinned, late):
    """Jobs `(key, rounds)` wait in order; endless further jobs of key 0 come behind them and may not keep them out."""
    places = Places(capacity)
    for key in pinned:
        places.pin(str(key))
    waiting = [(str(key), rounds) for key, rounds in jobs]
    running, coming = [], {}
    for _ in range(60 * len(jobs)):
        for key in [key for key, rounds in coming.items() if not rounds]:
            places.arrived(key)
        coming = {key: rounds - 1 for key, rounds in coming.items() if rounds}
        places.start_round()
        behind = ("0", 2)
        for job in [*waiting, behind]:
            key = job[0]
            if key not in places and places.want(key) is not None:
                coming[key] = late
            if places.enter(key):
                running.append(job)
                waiting = [other for other in waiting if other is not job]
        places.check()
        for key, rounds in running:
            if rounds == 1:
                places.leave(key)
        running = [(key, rounds - 1) for key, rounds in running if rounds > 1]
        places.check()
        if not waiting:
            return

    raise AssertionError(f"still waiting: {waiting}")
