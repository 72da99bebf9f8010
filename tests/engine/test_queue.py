from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from rigs import make_sequence

from lorax_core.engine.queue import WaitingQueue


@dataclass(frozen=True)
class Named:
    """All that the queue sees of an adapter."""

    identity: str


def joined(queue, *names, priority=0):
    """One new sequence for each name, in this order; an empty name is the base."""
    made = [make_sequence([1], 1, adapter=Named(name) if name else None) for name in names]
    for sequence in made:
        sequence.priority = priority
        queue.join(sequence)
    return made


def served(queue, count):
    """Who runs next, so many times."""
    order = []
    for _ in range(count):
        order.append(queue.first().salt)
        queue.serve()
    return order


def test_one_adapter_is_served_in_order_of_arrival():
    queue = WaitingQueue()
    made = joined(queue, "a", "a", "a")

    assert list(queue) == made


def test_one_that_comes_late_waits_for_one_of_a_flood_and_not_for_all():
    queue = WaitingQueue()
    joined(queue, *["flood"] * 50)
    assert served(queue, 10) == ["flood"] * 10

    joined(queue, "late", "")

    assert served(queue, 4) == ["flood", "late", "", "flood"]


def test_silence_earns_nothing():
    queue = WaitingQueue()
    joined(queue, *["busy"] * 20, "quiet")
    served(queue, 15)

    joined(queue, *["quiet"] * 4)

    assert served(queue, 6) == ["busy", "quiet"] * 3


def test_urgent_requests_do_not_make_their_adapter_late():
    queue = WaitingQueue()
    joined(queue, *["a"] * 30)
    joined(queue, *["a"] * 3, priority=1)
    served(queue, 3)

    joined(queue, "b")

    assert served(queue, 3) == ["a", "b", "a"]


def test_who_leaves_is_not_waited_for():
    queue = WaitingQueue()
    flood = joined(queue, *["a"] * 9)
    for sequence in flood:
        sequence.finished = True
        queue.depart(sequence, waiting=True)

    (fresh,) = joined(queue, "a")

    assert len(queue) == 1
    assert queue.first() is fresh
    assert fresh.turn == 1


def test_who_leaves_is_not_kept_though_nobody_comes_after():
    queue = WaitingQueue()
    made = joined(queue, *["a", "b"] * 50)
    for sequence in made[10:]:
        sequence.finished = True
        queue.depart(sequence, waiting=True)
        queue.check()

    assert len(queue._heap) <= 20
    assert list(queue) == made[:10]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_adapters_that_wait_are_served_equally_often(counts, random):
    queue = WaitingQueue()
    names = [str(flow) for flow, count in enumerate(counts) for _ in range(count)]
    random.shuffle(names)
    joined(queue, *names)

    order = served(queue, len(names))

    assert sorted(order) == sorted(names)
    for stop in range(len(order)):
        waiting = {name for name in names if order[:stop].count(name) < names.count(name)}
        shares = [order[:stop].count(name) for name in waiting]
        assert not shares or max(shares) - min(shares) <= 1
    queue.check()
