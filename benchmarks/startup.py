"""How long `lorax models list` takes, beside what cannot be faster and what it must never do.

Runs each command several times in new processes, in turns, so that a change in the machine's load meets all of them,
and reports medians, the fastest run, and ratios. Knows nothing of why a number is what it is: `python -X importtime` does.

    python benchmarks/startup.py [--repeats 9] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

AIM_SECONDS = 0.25
FLOOR, LIST, TERMINAL, TORCH = (
    "python -c pass",
    "lorax models list",
    "the same, on a terminal",
    'python -c "import torch"',
)


def on_pipe(command: list[str]) -> None:
    """Runs a command as a script would. Raises `CalledProcessError` when it fails."""
    subprocess.run(command, check=True, capture_output=True)


def on_terminal(command: list[str]) -> None:
    """Runs a command as a person would: the table is then laid out and coloured by rich."""
    master, slave = os.openpty()
    try:
        subprocess.run(command, check=True, stdout=slave, stderr=subprocess.PIPE)
    finally:
        os.close(slave)
        os.close(master)


def seconds(run: Callable[[list[str]], None], command: list[str]) -> float:
    """The wall time of one run."""
    start = time.perf_counter()
    run(command)
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, list[float]]:
    """Wall times by name of the command, in the order of the runs."""
    lorax = str(Path(sysconfig.get_path("scripts"), "lorax"))
    cases: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
        FLOOR: (on_pipe, [sys.executable, "-c", "pass"]),
        LIST: (on_pipe, [lorax, "models", "list"]),
        TERMINAL: (on_terminal, [lorax, "models", "list"]),
        TORCH: (on_pipe, [sys.executable, "-c", "import torch"]),
    }
    if not hasattr(os, "openpty"):
        del cases[TERMINAL]
    for run, command in cases.values():
        run(command)  # once unmeasured: bytecode is compiled, files come into the page cache
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (run, command) in cases.items():
            times[name].append(seconds(run, command))
    return times


def report(times: dict[str, list[float]]) -> dict[str, object]:
    """The numbers that are printed, as JSON has them."""
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    return {
        "schema": 1,
        "aim_seconds": AIM_SECONDS,
        "plugins": len(entry_points(group="lorax.plugins")),
        "repeats": len(times[FLOOR]),
        "commands": {
            name: {
                "median_seconds": round(median, 4),
                "fastest_seconds": round(min(times[name]), 4),
                "times_python_pass": round(median / medians[FLOOR], 2),
                "times_import_torch": round(median / medians[TORCH], 3),
            }
            for name, median in medians.items()
        },
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="How long `lorax models list` takes.")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give 1 or more")
    times = measure(options.repeats)
    numbers = report(times)
    if options.json:
        print(json.dumps(numbers, indent=2))
        return
    floor, torch = statistics.median(times[FLOOR]), statistics.median(times[TORCH])
    print(f"{numbers['plugins']} plugins installed, {options.repeats} runs each, aim {AIM_SECONDS} s")
    print(f"{'':26}{'median':>9}{'fastest':>9}{'x pass':>9}{'x torch':>9}")
    for name, runs in times.items():
        median = statistics.median(runs)
        print(f"{name:26}{median:8.3f}s{min(runs):8.3f}s{median / floor:9.1f}{median / torch:9.2f}")


if __name__ == "__main__":
    main()
