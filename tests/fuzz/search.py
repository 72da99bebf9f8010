"""Whether a planted defect is found: shared by the tests and `python -m fuzz --planted`."""

from __future__ import annotations

from pathlib import Path

from fuzz.planted import PLANTS
from fuzz.pool import Worker
from fuzz.verdicts import Verdict

DEADLINE = 6.0


def find_plant(name: str, root: Path, worker: Worker | None, seed: int = 0) -> tuple[Verdict | None, Worker]:
    """The first case that finds the defect as what it is, None when none does within its bound; and a live worker.

    What cases find without the defect is left out: it would prove nothing.
    """
    plant = PLANTS[name]
    for case in range(plant.within):
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            worker = Worker(root, DEADLINE)
        verdict = worker.run((plant.campaign, seed, case), name)
        if verdict.finding is plant.found_as:
            if not worker.alive:
                worker.close()
                worker = Worker(root, DEADLINE)
            if worker.run((plant.campaign, seed, case)).finding is not plant.found_as:
                return verdict, worker
    assert worker is not None
    return None, worker
