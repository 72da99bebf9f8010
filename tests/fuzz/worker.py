"""One worker: a process of limited memory that runs the cases it is told of, one by one.

Speaks lines of JSON. In: `[campaign, seed, case, plant]`. Out: `{"phase": ...}` as phases begin, `{"verdict": ...}` at the end.
After a case that left an engine broken it ends itself, and is replaced.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from fuzz.house import House

ADDRESS_SPACE = 6 * 2**30
"""Bytes; a worker with all libraries and engines has 2 GiB mapped, of which it holds half a GiB."""


def main(root: Path, scratch: Path, deadline: float) -> None:
    """Serve until the input ends."""
    # Streams of their own for the protocol: what libraries print, and ask of a terminal, goes nowhere.
    orders, told = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    from fuzz.house import House

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    house = House(root, scratch)
    dumped = (scratch.parent / f"{scratch.name}.stack").open("w+")

    def tell(message: dict[str, object]) -> None:
        told.write(json.dumps(message) + "\n")
        told.flush()

    tell({"ready": True})
    for line in orders:
        campaign, seed, case, plant = json.loads(line)
        dumped.seek(0)
        dumped.truncate()
        broken = _run(house, campaign, seed, case, plant, tell, lambda: _watch(dumped, deadline))
        faulthandler.cancel_dump_traceback_later()
        if broken:
            os._exit(3)
    os._exit(0)  # threads of hung engines must not hold it up


def _watch(file: IO[str], deadline: float) -> None:
    """Just before this process is killed, write where it hangs."""
    faulthandler.dump_traceback_later(max(1.0, deadline - 1.0), file=file)


def _run(
    house: House, campaign: str, seed: int, case: int, plant: str, tell: Callable[..., None], watch: Callable[[], None]
) -> bool:
    from fuzz.campaigns import make
    from fuzz.judge import Outcome, judge, timed
    from fuzz.planted import planted
    from fuzz.verdicts import Finding, Kind

    tell({"phase": "make"})
    attempt = make(campaign, seed, case, house)
    house.probe_failed(attempt.engines)  # loaded and known before anything hostile happens
    watch()
    tell(
        {
            "phase": "ours",
            "changes": [change.encode("utf-8", "backslashreplace").decode()[:300] for change in attempt.changes],
        }
    )
    with planted(plant):
        outcome, seconds = timed(lambda: judge(attempt, lambda phase: tell({"phase": phase})))
        tell({"phase": "ours"})
        failed = house.probe_failed(attempt.engines)
    if failed:
        outcome = Outcome(
            Kind.FINDING, Finding.BROKEN, outcome.error, outcome.where, f"{failed}; the case itself: {outcome.detail}"
        )
    house.clear()
    tell({"verdict": outcome.verdict(campaign, seed, case, attempt.changes, seconds).to_json()})
    return bool(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
