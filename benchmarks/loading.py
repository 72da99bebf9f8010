"""How long it takes from a checkpoint in the file cache to the first token, and how much memory.

    python benchmarks/loading.py [--size 0.5b|small] [--stored bfloat16|float32] [--rounds 3] [--json]

A Qwen2 of random weights is stored, and then loaded in new processes, in turns: by ours, by transformers, and by a process that
only reads the bytes, once into memory that is used again and once into memory that is kept. Ratios are of one round; medians of
all. Memory is what the process has beside files (RssAnon, Linux alone), less what it had after its imports, over the weights as
they are computed with. Knows nothing of why a number is what it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CASES: dict[str, tuple[str, ...]] = {
    "transformers float32": ("transformers", "float32"),
    "lorax float32": ("lorax", "float32"),
    "transformers bfloat16": ("transformers", "bfloat16"),
    "lorax bfloat16": ("lorax", "bfloat16"),
    "lorax int8": ("lorax", "bfloat16", "int8"),
    "lorax int4": ("lorax", "bfloat16", "int4"),
}
PROMPT = [1, 2, 3, 4]
talk = Console(stderr=True)


class Memory:
    """The most memory beside files that this process has held since `start`."""

    def __init__(self) -> None:
        self._before = self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._before = self.now()
        self._thread.start()

    def stop(self) -> int:
        """The most bytes so far, less those at the start."""
        self._over.set()
        self._thread.join()
        return max(self._most, self.now()) - self._before

    @staticmethod
    def now() -> int:
        """Bytes at this moment; 0 where the system does not say."""
        status = Path("/proc/self/status")
        lines = status.read_text("ascii").splitlines() if status.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self._most = max(self._most, self.now())


def read(files: Iterable[Path]) -> dict[str, float]:
    """Seconds to read files into memory that is used again, and into memory that is kept."""
    files, buffer = list(files), bytearray(1 << 20)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    middle = time.perf_counter()
    kept = [file.read_bytes() for file in files]
    return {"again": middle - start, "kept": time.perf_counter() - middle, "bytes": sum(map(len, kept))}


def weight_bytes(model: Any) -> int:
    """Memory of a model's weights, each once; of ours, as they are prepared."""
    found = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    for module in model.modules():
        kernel = getattr(module, "_kernel", None)
        if kernel is not None:
            found[id(kernel.packed if hasattr(kernel, "packed") else kernel.weight)] = kernel.nbytes
    return sum(found.values())


def load(who: str, folder: str, dtype: str, quantize: str | None = None) -> dict[str, float]:
    """Seconds of imports, of loading and of the first token after it, and memory, in this process."""
    started, memory = time.perf_counter(), Memory()
    import torch

    if who == "lorax":
        import lorax_core as lorax

        lorax.load  # noqa: B018  (imports what it needs)
    else:
        from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: F401
    imported = time.perf_counter()
    memory.start()
    if who == "lorax":
        engine = lorax.load(folder, dtype=dtype, quantize=quantize)
        loaded = time.perf_counter()
        engine.generate(PROMPT, max_tokens=1)
        models: list[Any] = []
        engine._worker.call(lambda loop: models.append(loop._runner._model))
    else:
        models = [AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))]
        loaded = time.perf_counter()
        with torch.inference_mode():
            models[0](torch.tensor([PROMPT])).logits[0, -1].argmax().item()
    answered = time.perf_counter()
    return {
        "imports": imported - started,
        "load": loaded - imported,
        "first_token": answered - loaded,
        "peak_bytes": memory.stop(),
        "weight_bytes": weight_bytes(models[0]),
    }


def in_this_process(who: str, folder: str, *how: str) -> dict[str, float]:
    """What is measured of one case, or of reading."""
    return read(sorted(Path(folder).glob("*.safetensors"))) if who == "read" else load(who, folder, *how)


def in_new_process(*arguments: str) -> dict[str, float]:
    """The same in a new one."""
    # Compiled modules are kept between runs, as they are on a user's machine.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, __file__, "--in-this-process", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: str, rounds: int, run: Callable[..., dict[str, float]] = in_new_process) -> dict[str, Any]:
    """Medians over rounds, each case in a new process."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    reads: list[dict[str, float]] = []
    for who, *how in CASES.values():
        run(who, folder, *how)  # once unmeasured: kernels are compiled, files cached
    for at in range(rounds):
        talk.print(f"round {at + 1} of {rounds} …")
        reads.append(run("read", folder))
        for name, (who, *how) in CASES.items():
            one = run(who, folder, *how)
            seconds = one["load"] + one["first_token"]
            one["times_read"], one["times_kept"] = (seconds / reads[-1][how] for how in ("again", "kept"))
            one["peak_over_weights"] = one["peak_bytes"] / one["weight_bytes"]
            found[name].append(one)
            reference = found[f"transformers {how[0]}"][at]
            one["times_transformers"] = (reference["load"] + reference["first_token"]) / seconds
    return {
        "read": medians(reads),
        "cases": {name: medians(runs) for name, runs in found.items()},
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Figure by figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def show(found: dict[str, Any]) -> None:
    """A table on stdout."""
    reading = found["read"]
    title = f"{reading['bytes'] / 1e9:.2f} GB, read in {reading['again']:.2f} s, and to keep in {reading['kept']:.2f} s"
    table = Table("", "imports", "load", "first token", "/ read", "/ kept", "x theirs", "peak / weights", title=title)
    for name, one in found["cases"].items():
        table.add_row(
            name,
            *(f"{one[key]:.2f} s" for key in ("imports", "load", "first_token")),
            *(f"{one[key]:.1f}" for key in ("times_read", "times_kept")),
            f"{one['times_transformers']:.2f}",
            f"{one['peak_over_weights']:.2f}",
        )
    Console().print(table)


def main() -> None:
    """Measures and prints."""
    if sys.argv[1:2] == ["--in-this-process"]:
        print(json.dumps(in_this_process(*sys.argv[2:])))
        return
    import torch
    from engine import SIZES, make_model

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--stored", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        talk.print(f"making a random Qwen2 of size {options.size} …")
        make_model(options.size, folder, dtype=getattr(torch, options.stored))
        found = measure(folder, options.rounds)
    if options.json:
        about = {"size": options.size, "stored": options.stored, "threads": torch.get_num_threads()}
        print(json.dumps({**about, "torch": torch.__version__, **found}, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
