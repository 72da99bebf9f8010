"""What adapters cost: one base, alone and with many of them in one batch.

    python benchmarks/adapters.py [--size 0.5b|small] [--widths float32 bfloat16 int8 int4] [--batch 16]
                                  [--tokens 8] [--rounds 3] [--many 1000] [--no-peft] [--json]

Rank 16 on every linear layer of a Qwen2 of random weights (answers are not read, only timed):

1. decoding and prompt processing with 1, 4, 16 and 64 distinct adapters in a batch, uniform and skewed, as shares of the base's
   rate, and with adapters that are loaded and not used;
2. the same batch through PEFT (`adapter_names=`), as a share of the base's rate in transformers, and against ours;
3. many small adapters (rank 8, queries and values, bfloat16), few of them on the device, requests over all of them.

PEFT takes part in float32 and bfloat16, which its base can have.

Machines are noisy: every round measures the base before and after the cases, and the figure is the median of the ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from engine import SIZES, make_model, timed
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

import lorax_core as lorax

Names = Sequence[str | None]
LINEARS = {
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "mlp.gate_proj": ("hidden", "intermediate"),
    "mlp.up_proj": ("hidden", "intermediate"),
    "mlp.down_proj": ("intermediate", "hidden"),
}
talk = Console(stderr=True)


def make_adapter(
    folder: Path, size: str, rank: int, targets: Sequence[str], seed: int, dtype: torch.dtype, device: str = "cpu"
) -> Path:
    """A random adapter in PEFT's format, its numbers drawn on a device."""
    shape = SIZES[size]
    kv = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    widths = {"hidden": shape["hidden_size"], "intermediate": shape["intermediate_size"], "kv": kv}
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 0.02).to("cpu", dtype)

    for layer in range(shape["num_hidden_layers"]):
        for name in targets:
            into, out = (widths[width] for width in LINEARS[name])
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = drawn(rank, into)
            tensors[f"{module}.lora_B.weight"] = drawn(out, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.rpartition(".")[2] for name in targets],
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_prompts(count: int, length: int, vocab: int, source: random.Random) -> list[list[int]]:
    """Prompts of random tokens, new ones each time, so that the prefix cache never has them."""
    return [[source.randrange(vocab) for _ in range(length)] for _ in range(count)]


def assignments(batch: int, adapters: int) -> Iterator[tuple[str, list[str]]]:
    """Which row has which adapter: evenly, and by a skewed popularity (the n-th adapter 1/n as often as the first)."""
    yield "uniform", [f"a{row % adapters}" for row in range(batch)]
    if adapters > 1:
        weights = [1 / (number + 1) for number in range(adapters)]
        yield "skewed", [f"a{number}" for number in random.Random(5).choices(range(adapters), weights, k=batch)]


class Clock:
    """Times the two halves of a batch over one engine."""

    def __init__(self, engine: lorax.Engine, vocab: int, tokens: int) -> None:
        self.engine = engine
        self.vocab = vocab
        self.tokens = tokens
        self.source = random.Random(11)

    def decode(self, names: Names) -> float:
        """Seconds of a decoding step: what further tokens add to a batch of short prompts."""
        one = self._seconds(names, 8, 2)
        all_of_them = self._seconds(names, 8, 2 + self.tokens)
        return (all_of_them - one) / self.tokens

    def prompts(self, names: Names) -> float:
        """Seconds of reading a prompt of 32 tokens for each row."""
        return self._seconds(names, 32, 1)

    def _seconds(self, names: Names, length: int, tokens: int) -> float:
        prompts = make_prompts(len(names), length, self.vocab, self.source)
        return timed(lambda: self.engine.generate(prompts, adapter=list(names), max_tokens=tokens, ignore_eos=True))


def shares(clock: Clock, cases: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """For each case the share of the base's rate that it keeps, in decoding and in reading prompts."""
    found: dict[str, dict[str, list[float]]] = {
        case: {"decode": [], "prompts": [], "base_step_ms": []} for case in cases
    }
    for _ in track(range(rounds), "rounds", console=talk):
        for rows in sorted({len(names) for names in cases.values()}):
            base: Names = [None] * rows
            before = clock.decode(base), clock.prompts(base)
            times = {
                case: (clock.decode(names), clock.prompts(names)) for case, names in cases.items() if len(names) == rows
            }
            after = clock.decode(base), clock.prompts(base)
            step, prompts = ((one + other) / 2 for one, other in zip(before, after, strict=True))
            for case, (mine, reading) in times.items():
                found[case]["base_step_ms"].append(1e3 * step)
                found[case]["decode"].append(step / mine)
                found[case]["prompts"].append(prompts / reading)
    return {
        case: {what: statistics.median(values) for what, values in figures.items()} for case, figures in found.items()
    }


def unused(
    folder: str, adapters: dict[str, str], options: dict[str, Any], vocab: int, tokens: int, batch: int
) -> float:
    """The share of its decoding rate that a base keeps when adapters are loaded and nobody names them."""
    ratios = []
    with lorax.load(folder, **options) as bare, lorax.load(folder, adapters=adapters, **options) as loaded:
        clocks = [Clock(engine, vocab, tokens) for engine in (bare, loaded)]
        for _ in range(5):
            without, with_them = (clock.decode([None] * batch) for clock in clocks)
            ratios.append(without / with_them)
    return statistics.median(ratios)


def peft_shares(model: Any, folders: dict[str, str], names: list[str], clock: Clock, rounds: int) -> dict[str, float]:
    """PEFT's mixed batch: what it keeps of transformers' base rate, and how much faster ours is in all."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *others = folders
        mixed = PeftModel.from_pretrained(
            model, folders[first], adapter_name=first, autocast_adapter_dtype=False
        ).eval()
        for name in others:
            mixed.load_adapter(folders[name], adapter_name=name, autocast_adapter_dtype=False)
    keeps, ahead = [], []

    def seconds(tokens: int, adapters: list[str] | None) -> float:
        ids = torch.tensor(make_prompts(len(names), 8, clock.vocab, clock.source))
        chosen = {"adapter_names": adapters} if adapters else {}
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return timed(
                lambda: mixed.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **chosen)
            )

    for _ in track(range(rounds), "PEFT", console=talk):
        mine = clock.decode(names)
        theirs = (seconds(2 + clock.tokens, names) - seconds(2, names)) / clock.tokens
        base_names = ["__base__"] * len(names)
        base = (seconds(2 + clock.tokens, base_names) - seconds(2, base_names)) / clock.tokens
        keeps.append(base / theirs)
        ahead.append(theirs / mine)
    return {"peft_share_of_its_base": statistics.median(keeps), "times_peft": statistics.median(ahead)}


def many(folder: str, root: Path, size: str, count: int, slots: int, options: dict[str, Any]) -> dict[str, float]:
    """Requests over many adapters of which few are on the device."""
    targets = ("self_attn.q_proj", "self_attn.v_proj")
    folders = {
        f"m{number}": make_adapter(root / f"m{number}", size, 8, targets, number, torch.bfloat16)
        for number in track(range(count), "making adapters", console=talk)
    }
    vocab = int(SIZES[size]["vocab_size"])
    source = random.Random(3)
    with lorax.load(folder, max_adapters=slots, max_cpu_adapters=4 * slots, **options) as engine:
        started = time.perf_counter()
        for name, where in track(folders.items(), "registering", console=talk):
            engine.adapters.load(name, where)
        registering = time.perf_counter() - started
        engine.generate(make_prompts(16, 8, vocab, source), adapter=[f"m{n}" for n in range(16)], max_tokens=2)
        before = resident()
        names = list(folders)
        source.shuffle(names)
        rates, bytes_after = [], []
        for part in range(4):
            chosen = names[part * count // 4 : (part + 1) * count // 4]
            prompts = make_prompts(len(chosen), 8, vocab, source)
            took = timed(lambda p=prompts, c=chosen: engine.generate(p, adapter=c, max_tokens=4, ignore_eos=True))  # type: ignore[misc]
            rates.append(len(chosen) / took)
            bytes_after.append(resident())
        held = [info.where for info in engine.adapters.list()]
    return {
        "registered": count,
        "on_device": held.count("device"),
        "registering_seconds": registering,
        "requests_per_second_first_quarter": rates[0],
        "requests_per_second_last_quarter": rates[-1],
        "growth_first_quarter_mb": (bytes_after[0] - before) / 1e6,
        "growth_last_quarter_mb": (bytes_after[-1] - bytes_after[-2]) / 1e6,
    }


def resident() -> int:
    """Bytes of memory of this process now; its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(results: dict[str, Any]) -> None:
    """A table on stdout."""
    table = Table("width", "case", "figure", "value")
    for width, cases in results.items():
        for case, figures in cases.items():
            for name, value in figures.items():
                table.add_row(width, case, name, f"{value:,.3f}")
    Console().print(table)


def cases_of(batch: int, most: int) -> dict[str, list[str]]:
    """The rows' adapters by the name of a case: up to 16 of them in a batch of the given size, 64 in 64 rows."""
    return {
        f"{count} adapters, {rows} rows, {popularity}": names
        for count in (1, 4, 16, 64)
        if count <= most
        for rows in (max(batch, count) if count <= 16 else 64,)
        for popularity, names in assignments(rows, count)
    }


def at_width(width: str, given: argparse.Namespace, folder: str, folders: dict[str, str], model: Any) -> dict[str, Any]:
    """All figures of a base with weights of one width: those of 8 and 4 bits in a model that is bfloat16 otherwise."""
    quantize = width if width.startswith("int") else None
    options: dict[str, Any] = {
        "dtype": "bfloat16" if quantize else width,
        "quantize": quantize,
        "kv_cache_tokens": 16_384,
    }
    vocab = int(SIZES[given.size]["vocab_size"])
    few = dict(list(folders.items())[:16])
    results: dict[str, Any] = {
        "loaded and unused": {"decode": unused(folder, few, options, vocab, given.tokens, given.batch)}
    }
    with lorax.load(folder, adapters=folders, **options) as engine:
        results["linear layers"] = dict(engine.info().linear_methods)
        clock = Clock(engine, vocab, given.tokens)
        results |= shares(clock, cases_of(given.batch, given.adapters), given.rounds)
        if not given.no_peft and quantize is None:
            names = [f"a{row % 16}" for row in range(given.batch)]
            theirs = copy.deepcopy(model).to(getattr(torch, width))
            results["PEFT, 16 adapters"] = peft_shares(theirs, few, names, clock, given.rounds)
    if given.many:
        with tempfile.TemporaryDirectory() as root:
            results["many adapters"] = many(folder, Path(root), given.size, given.many, given.slots, options)
    return results


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--widths", nargs="+", choices=("float32", "bfloat16", "int8", "int4"), default=["float32"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=64, help="Distinct ones of rank 16 at most.")
    parser.add_argument("--many", type=int, default=1000, help="Small adapters; 0 leaves that part out.")
    parser.add_argument("--slots", type=int, default=32, help="Of those, how many on the device.")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        talk.print(f"making a random Qwen2 of size {given.size} …")
        model = make_model(given.size, folder)
        folders = {
            f"a{number}": str(
                make_adapter(Path(folder, f"a{number}"), given.size, 16, tuple(LINEARS), number, torch.bfloat16)
            )
            for number in track(range(given.adapters), "making adapters", console=talk)
        }
        for width in given.widths:
            talk.print(width)
            results[width] = at_width(width, given, folder, folders, model)
    if given.json:
        facts = {"size": given.size, "threads": torch.get_num_threads(), "torch": torch.__version__}
        sys.stdout.write(json.dumps({**facts, **results}) + "\n")
    else:
        show(results)


if __name__ == "__main__":
    main()
