"""Two checkouts of this project, measured in turns: what a change costs or gains.

    python benchmarks/trees.py BEFORE AFTER [--size 0.5b|small] [--dtype float32] [--pairs 9] [--json]

Each pair is one fresh process for each checkout, their order alternating, over one checkpoint of random weights and sixteen
LoRA adapters of rank 16. Printed are the ratios AFTER / BEFORE of rates (more than 1 is faster) and of memory: the median of
the pairs, and the interval between the second lowest and the second highest. Where a process's pages lie changes its speed
by more than most changes of code do, so one pair says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from adapters import LINEARS, Clock, make_adapter, make_prompts, resident
from engine import SIZES, make_model, timed
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lorax_core as lorax

ADAPTERS = 16
talk = Console(stderr=True)


def measure(folder: Path, size: str, dtype: str) -> dict[str, float]:
    """Rates of one process, in tokens a second, and the bytes that it holds once the model is loaded."""
    vocab = int(SIZES[size]["vocab_size"])
    source = random.Random(4)
    before = resident()
    names = [f"a{number}" for number in range(ADAPTERS)]
    found: dict[str, float] = {}
    with lorax.load(folder / "model", dtype=dtype, kv_cache_tokens=8192) as engine:
        found["loaded_bytes"] = float(resident() - before)
        for name in names:
            engine.adapters.load(name, folder / name)
        clock = Clock(engine, vocab, 12)
        clock.decode(names)
        for rows in (1, 8, 16):
            found[f"decode_{rows}"] = rows / statistics.median(clock.decode([None] * rows) for _ in range(3))
        found["decode_16_adapters"] = 16 / statistics.median(clock.decode(names) for _ in range(3))
        prompts = make_prompts(8, 128, vocab, source)
        found["prompts_8x128"] = 8 * 128 / timed(lambda: engine.generate(prompts, max_tokens=1))
        clock.prompts(names)
        found["prompts_16_adapters"] = 16 * 32 / clock.prompts(names)
    return found


def run(tree: Path, folder: Path, size: str, dtype: str) -> dict[str, float]:
    """One process over a checkout."""
    # The benchmark itself is this checkout's; what it measures is the other one.
    paths = [tree / "core", tree, Path(__file__).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, __file__, "--worker", str(folder), "--size", size, "--dtype", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(trees: tuple[Path, Path], folder: Path, size: str, dtype: str, pairs: int) -> dict[str, dict[str, float]]:
    """The ratios of the second checkout to the first."""
    ratios: dict[str, list[float]] = {}
    for pair in track(range(pairs), "pairs", console=talk):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        figures = {at: run(trees[at], folder, size, dtype) for at in order}
        for name, value in figures[1].items():
            ratios.setdefault(name, []).append(value / figures[0][name])
    summary = {}
    for name, values in ratios.items():
        ordered = sorted(values)
        inner = ordered[1:-1] or ordered
        summary[name] = {"median": statistics.median(ordered), "low": inner[0], "high": inner[-1]}
    return summary


def main() -> None:
    """Make the checkpoint, run the pairs, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, metavar="BEFORE AFTER")
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        sys.stdout.write(json.dumps(measure(given.worker, given.size, given.dtype)) + "\n")
        return
    if len(given.trees) != 2:
        parser.error("name two checkouts")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        talk.print(f"making a random Qwen2 of size {given.size} and {ADAPTERS} adapters …")
        make_model(given.size, str(folder / "model"))
        for number in range(ADAPTERS):
            make_adapter(folder / f"a{number}", given.size, 16, tuple(LINEARS), number, torch.bfloat16)
        before, after = (tree.resolve() for tree in given.trees)
        summary = compare((before, after), folder, given.size, given.dtype, given.pairs)
    if given.json:
        facts = {"size": given.size, "dtype": given.dtype, "pairs": given.pairs, "threads": torch.get_num_threads()}
        sys.stdout.write(json.dumps({**facts, "ratios": summary}) + "\n")
        return
    table = Table("figure", "median", "interval")
    for name, ratio in summary.items():
        table.add_row(name, f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
