"""`benchmarks/adapters.py` at tiny size: one command tells what adapters cost a base of each width."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks/adapters.py"


def test_one_command_tells_the_shares_at_several_widths():
    few = ["--adapters", "4", "--batch", "4", "--tokens", "2", "--rounds", "1", "--many", "0"]
    command = [sys.executable, str(BENCHMARK), "--size", "tiny", "--widths", "bfloat16", "int8", *few, "--json"]

    # One thread: several on cores that other tests use wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    cases = {
        "loaded and unused",
        "1 adapters, 4 rows, uniform",
        "4 adapters, 4 rows, uniform",
        "4 adapters, 4 rows, skewed",
    }
    assert set(told["int8"]) == {*cases, "linear layers"}
    assert set(told["bfloat16"]) == {*cases, "linear layers", "PEFT, 16 adapters"}
    assert set(told["int8"]["linear layers"]) == {"int8"}
