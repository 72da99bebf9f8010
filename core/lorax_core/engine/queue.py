"""The sequences that wait to run, in the order of start-time fair queueing.

Decides whose turn it is. The sequences of one adapter at one priority are a flow (the base is an adapter here), and every
sequence costs one turn: an adapter that floods the queue delays each other one by a sequence a round. Knows nothing of pages.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorax_core.engine.sequence import Sequence


@dataclass(slots=True)
class _Flow:
    """The living sequences of one adapter at one priority, and the last turn that was assigned to one of them."""

    alive: int = 0
    last: int = 0


@dataclass(slots=True)
class _Level:
    """A priority: its virtual time, which is the turn being served, and how many sequences wait."""

    turn: int = 0
    waiting: int = 0


class WaitingQueue:
    """Waiting sequences by rank, smallest first.

    A new sequence's turn is one after the last of its flow, or after the virtual time of its priority if that is later. So
    waiting flows advance side by side, and one that was idle starts beside the others without credit. A priority that was
    empty starts at the furthest virtual time of all.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []  # cancelled ones stay for a while
        self._arrivals = 0
        self._levels: defaultdict[int, _Level] = defaultdict(_Level)
        self._flows: dict[tuple[str, int], _Flow] = {}

    def __len__(self) -> int:
        return sum(level.waiting for level in self._levels.values())

    def __iter__(self) -> Iterator[Sequence]:
        yield from (sequence for _, sequence in sorted(self._heap, key=_first) if not sequence.finished)

    def join(self, sequence: Sequence) -> None:
        """A new sequence."""
        flow = self._joined(sequence)
        level = self._levels[sequence.priority]
        if not level.waiting:
            level.turn = max(other.turn for other in self._levels.values())
        sequence.turn = flow.last = max(flow.last, level.turn) + 1
        self.put_back([sequence])

    def accompany(self, sequence: Sequence, parent: Sequence) -> None:
        """A new sequence that runs at once, in the turn of its parent."""
        self._joined(sequence)
        sequence.turn = parent.turn

    def depart(self, sequence: Sequence, *, waiting: bool) -> None:
        """A sequence that joined is finished; `waiting` when it is still in the queue."""
        self._levels[sequence.priority].waiting -= waiting
        if waiting and len(self._heap) > 2 * len(self):
            # Nobody may come who would take them off the top, and a sequence holds its prompt.
            self._heap = [item for item in self._heap if not item[1].finished]
            heapq.heapify(self._heap)
        flow = self._flows[sequence.salt, sequence.priority]
        flow.alive -= 1
        if not flow.alive:
            # Otherwise the dict would grow with every adapter.
            del self._flows[sequence.salt, sequence.priority]

    def first(self) -> Sequence | None:
        """The sequence whose turn it is; None when the queue is empty."""
        while self._heap and self._heap[0][1].finished:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Take out the first, to run or to be put back after the plan."""
        _, sequence = heapq.heappop(self._heap)
        self._levels[sequence.priority].waiting -= 1
        return sequence

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Sequences that were taken out, or ran, wait again in their old turn."""
        for sequence in sequences:
            heapq.heappush(self._heap, (sequence.rank, sequence))
            self._levels[sequence.priority].waiting += 1

    def serve(self) -> None:
        """The first runs now."""
        sequence = self.pop()
        level = self._levels[sequence.priority]
        # max: a preempted sequence comes back in an old turn, and virtual time must not run backwards.
        level.turn = max(level.turn, sequence.turn)

    def check(self) -> None:
        """Prove the invariants; AssertionError otherwise."""
        waiting = list(self)
        assert len(waiting) == len(self), "a waiting sequence is not counted"
        assert all(sequence.computed == 0 and not sequence.pages for sequence in waiting), "a waiting one holds pages"

    def _joined(self, sequence: Sequence) -> _Flow:
        self._arrivals += 1
        sequence.id = self._arrivals
        flow = self._flows.setdefault((sequence.salt, sequence.priority), _Flow())
        flow.alive += 1
        return flow


def _first(item: tuple[tuple[int, int], Sequence]) -> tuple[int, int]:
    return item[0]
