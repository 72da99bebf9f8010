"""What a GPU makes of the engine, against the limits of the same GPU and transformers, in one run.

    python benchmarks/gpu.py [--sizes 0.5b 7b] [--parts decode prompts adapters encoder] [--dtype bfloat16] [--rounds 3]
                             [--attention NAME] [--device cuda] [--output FILE]

First the limits: how fast memory is copied, and a large product computed. Then on a Qwen2 of random weights (answers are not
read, only timed):

1. decode: a decoding step with 1, 8, 64 and 256 rows, as a share of the time in which its weights, keys and values can be read;
2. prompts: eight of 1,024 tokens and one of 8,192, as a share of the product's rate;
3. adapters: 64 rows with 16 and with 64 adapters of rank 16, as shares of the base's rate;
4. encoder: texts of mixed lengths through a BERT of random weights.

All but the third are compared with transformers. The file, by default in benchmarks/results/, is written after every part, so
what a time limit cuts short is not lost. It says which card, versions, backend and kernels the figures belong to.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from adapters import LINEARS, Clock, make_adapter, make_prompts, shares
from engine import SIZES, make_model, timed
from rich.console import Console

import lorax_core as lorax
from lorax_core.plugins.host import PluginHost

Figures = dict[str, float]
Told = Callable[[dict[str, Any]], None]
PARTS = ("decode", "prompts", "adapters", "encoder")
RESULTS = Path(__file__).resolve().parent / "results"
ENCODERS = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
}
talk = Console(stderr=True)


@dataclass(frozen=True)
class Load:
    """What is computed: enough for a GPU, unless a test asks for less."""

    dtype: str = "bfloat16"
    device: str = "cuda"
    attention: str | None = None
    rounds: int = 3
    batches: tuple[int, ...] = (1, 8, 64, 256)
    context: int = 128
    tokens: int = 64
    prompts: tuple[tuple[int, int], ...] = ((8, 1024), (1, 8192))
    adapters: tuple[int, ...] = (16, 64)
    adapted_rows: int = 64
    texts: int = 256
    text_tokens: int = 256
    copy_bytes: int = 1 << 30
    product: int = 8192
    encoder: str = "base"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass
class Report:
    """The figures, which are written again whenever there are more."""

    path: Path
    facts: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, figures: Any) -> None:
        """Keep the figures of one part."""
        self.found[name] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.facts, **self.found}, indent=2) + "\n", encoding="utf-8")
        talk.print(f"{name}: {json.dumps(figures)}")


def seconds(job: Callable[[], object], load: Load) -> float:
    """The median time of a job, the device's work included; one run before is not counted."""

    def whole() -> None:
        job()
        if load.device != "cpu":
            torch.cuda.synchronize()

    whole()
    return statistics.median(timed(whole) for _ in range(load.rounds))


def limits(load: Load) -> Figures:
    """How many bytes a second a copy reads and writes, and how many operations a second a product is worth."""
    here = torch.zeros(load.copy_bytes, dtype=torch.uint8, device=load.device)
    there = torch.empty_like(here)
    copying = seconds(lambda: there.copy_(here), load)
    left = torch.randn(load.product, load.product, dtype=load.torch_dtype, device=load.device)
    multiplying = seconds(lambda: left @ left, load)
    return {
        "bytes_per_second": 2 * load.copy_bytes / copying,
        "operations_per_second": 2 * load.product**3 / multiplying,
    }


@dataclass(frozen=True)
class Work:
    """What a model of one size has to read and to compute, at the least."""

    size: str
    itemsize: int

    @property
    def layer_weights(self) -> int:
        """The numbers in the matrices of all layers."""
        shape = SIZES[self.size]
        hidden, kv = shape["hidden_size"], self._kv_width
        each = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
        return each * shape["num_hidden_layers"]

    @property
    def _kv_width(self) -> int:
        shape = SIZES[self.size]
        return shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def step_bytes(self, rows: int, context: int) -> int:
        """What a decoding step reads: all matrices, the head's with them, and the keys and values of its rows."""
        shape = SIZES[self.size]
        weights = self.layer_weights + shape["hidden_size"] * shape["vocab_size"]
        cached = rows * context * 2 * self._kv_width * shape["num_hidden_layers"]
        return (weights + cached) * self.itemsize

    def prompt_operations(self, count: int, length: int) -> int:
        """The products and the causal attention of some prompts; the head, which reads one row each, is left out."""
        shape = SIZES[self.size]
        attention = 2 * length * length * shape["hidden_size"] * shape["num_hidden_layers"]
        return count * (2 * self.layer_weights * length + attention)


def step_seconds(generate: Callable[[int, int], object], rows: int, load: Load) -> float:
    """A decoding step: what further tokens add to a batch of `rows` prompts that are read in both cases."""
    few, many = (seconds(lambda n=count: generate(rows, n), load) for count in (2, 2 + load.tokens))  # type: ignore[misc]
    return max(many - few, 1e-9) / load.tokens


def decode(generate: Callable[[int, int], object], work: Work, limit: Figures, load: Load) -> dict[str, Figures]:
    """Decoding by rows: tokens a second, and the share of the memory's limit."""
    found = {}
    for rows in load.batches:
        step = step_seconds(generate, rows, load)
        least = work.step_bytes(rows, load.context + load.tokens // 2) / limit["bytes_per_second"]
        found[str(rows)] = {"step_ms": 1e3 * step, "tokens_per_second": rows / step, "share_of_memory": least / step}
    return found


def prompts(read: Callable[[int, int], object], work: Work, limit: Figures, load: Load) -> dict[str, Figures]:
    """Reading prompts: tokens a second, and the share of the product's rate."""
    found = {}
    for count, length in load.prompts:
        took = seconds(lambda c=count, n=length: read(c, n), load)  # type: ignore[misc]
        least = work.prompt_operations(count, length) / limit["operations_per_second"]
        found[f"{count}x{length}"] = {"tokens_per_second": count * length / took, "share_of_products": least / took}
    return found


def cache_tokens(load: Load) -> int:
    """A cache that holds the largest batch."""
    decoding = max(max(load.batches), load.adapted_rows) * (load.context + load.tokens + 512)
    return max(decoding, *(2 * count * length for count, length in load.prompts))


def ours(
    folder: Path, size: str, parts: Sequence[str], limit: Figures, load: Load, host: PluginHost | None, told: Told
) -> None:
    """The engine's figures, and what it computed them with; `told` gets all that is known whenever there is more."""
    vocab, source = SIZES[size]["vocab_size"], random.Random(1)
    work = Work(size, load.torch_dtype.itemsize)
    found: dict[str, Any] = {}

    def know(part: str, figures: Any) -> None:
        found[part] = figures
        told(found)

    names = [f"a{number}" for number in range(max(load.adapters, default=0) if "adapters" in parts else 0)]
    options: dict[str, Any] = {"dtype": load.dtype, "device": load.device, "attention": load.attention}
    batch: dict[str, Any] = {"max_batch_rows": max(*load.batches, load.adapted_rows), "max_batch_tokens": 8192}
    with lorax.load(folder / "model", host=host, kv_cache_tokens=cache_tokens(load), **options, **batch) as engine:
        engine.warmup()
        know("load", {"bytes_per_second": engine.info().load_bytes_per_second, "seconds": engine.info().load_seconds})
        # As a server would: what lives as long as the process is not looked through for garbage between steps.
        gc.collect()
        gc.freeze()

        def generate(rows: int, tokens: int, length: int = load.context) -> None:
            texts = make_prompts(rows, length, vocab, source)
            engine.generate(texts, max_tokens=tokens, ignore_eos=True)

        if "decode" in parts:
            know("decode", decode(generate, work, limit, load))
        if "prompts" in parts:
            know("prompts", prompts(lambda count, length: generate(count, 1, length), work, limit, load))
        for number, name in enumerate(names):
            made = make_adapter(folder / name, size, 16, tuple(LINEARS), number, load.torch_dtype, load.device)
            engine.adapters.load(name, made)
        cases = {
            f"{count} adapters, {load.adapted_rows} rows": [names[row % count] for row in range(load.adapted_rows)]
            for count in load.adapters
            if names
        }
        if cases:
            clock = Clock(engine, vocab, load.tokens)
            clock.decode(names[: load.adapted_rows])
            know("adapters", shares(clock, cases, load.rounds))
        know("made_of", made_of(engine))
    gc.unfreeze()


def made_of(engine: lorax.Engine) -> dict[str, Any]:
    """Which backend and kernels computed, and how many steps were replayed from graphs."""
    info = engine.info()
    kept = (
        "attention",
        "passed_over",
        "dtype",
        "device",
        "lora_kernel",
        "linear_methods",
        "linear_notes",
        "step_bytes",
    )
    facts = {name: value for name, value in asdict(info).items() if name in kept}
    return {**facts, "graphs": dict(info.totals.graphs)}


def theirs(model: Any, size: str, parts: Sequence[str], limit: Figures, load: Load) -> dict[str, Any]:
    """The same by transformers, in static batches."""
    vocab, source = SIZES[size]["vocab_size"], random.Random(1)
    work = Work(size, load.torch_dtype.itemsize)

    @torch.inference_mode()
    def generate(rows: int, tokens: int, length: int = load.context) -> None:
        ids = torch.tensor(make_prompts(rows, length, vocab, source), device=load.device)
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    found: dict[str, Any] = {}
    if "decode" in parts:
        found["decode"] = decode(generate, work, limit, load)
    if "prompts" in parts:
        found["prompts"] = prompts(lambda count, length: generate(count, 1, length), work, limit, load)
    return found


def encoder(root: Path, load: Load, host: PluginHost | None) -> Figures:
    """Tokens a second of texts of mixed lengths: the engine's, and those of transformers in padded batches of 64."""
    from transformers import AutoModel, BertConfig

    torch.manual_seed(0)
    config = BertConfig(**ENCODERS[load.encoder])
    with torch.device(load.device):
        model = AutoModel.from_config(config, dtype=load.torch_dtype).eval()
    model.save_pretrained(root / "encoder")
    source = random.Random(2)
    lengths = sorted(source.randint(max(load.text_tokens // 8, 1), load.text_tokens) for _ in range(load.texts))
    texts = [make_prompts(1, length, config.vocab_size, source)[0] for length in lengths]
    options: dict[str, Any] = {"dtype": load.dtype, "device": load.device, "attention": load.attention}
    with lorax.load(root / "encoder", host=host, max_batch_tokens=16_384, **options) as engine:
        mine = seconds(lambda: engine.embed(texts), load)

    @torch.inference_mode()
    def padded() -> None:
        for at in range(0, len(texts), 64):
            batch = texts[at : at + 64]
            longest = max(map(len, batch))
            ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch], device=load.device)
            mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch], device=load.device)
            model(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1).float().cpu()

    other = seconds(padded, load)
    total = sum(lengths)
    return {
        "lorax_tokens_per_second": total / mine,
        "transformers_tokens_per_second": total / other,
        "times_transformers": other / mine,
    }


def facts(load: Load) -> dict[str, Any]:
    """What the figures belong to."""
    packages = ("torch", "triton", "flashinfer-python", "flash-attn", "transformers", "lorax-core")
    versions = {name: metadata.version(name) for name in packages if _installed(name)}
    card, capability, memory = platform.processor() or "cpu", None, None
    if load.device != "cpu":
        properties = torch.cuda.get_device_properties(load.device)
        card, memory = properties.name, properties.total_memory
        capability = f"{properties.major}.{properties.minor}"
    return {
        "card": card,
        "compute_capability": capability,
        "memory": memory,
        "cuda": torch.version.cuda,
        "versions": versions,
        "load": asdict(load),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def measure(
    sizes: Sequence[str], parts: Sequence[str], load: Load, report: Report, host: PluginHost | None = None
) -> None:
    """Run the parts, smallest model first, and report each."""
    limit = limits(load)
    report.add("limits", limit)
    for size in sizes if set(parts) - {"encoder"} else ():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            talk.print(f"making a random Qwen2 of size {size} …")
            make_model(size, str(folder / "model"), dtype=load.torch_dtype, device=load.device)
            _free(load)
            ours(folder, size, parts, limit, load, host, partial(report.add, f"{size}, lorax"))
            _free(load)
            if {"decode", "prompts"} & set(parts):
                # Read back rather than kept: both at once would share the GPU's memory.
                from transformers import AutoModelForCausalLM

                model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=load.torch_dtype).to(load.device)
                report.add(f"{size}, transformers", theirs(model.eval(), size, parts, limit, load))
                del model
                _free(load)
    if "encoder" in parts:
        with tempfile.TemporaryDirectory() as name:
            report.add("encoder", encoder(Path(name), load, host))


def _free(load: Load) -> None:
    gc.collect()
    if load.device != "cpu":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and say where the figures are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "7b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", help="A backend by name, instead of the first that can be used.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="Where the figures go; by default a file named after the card.")
    given = parser.parse_args(arguments)
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; `--device cpu --sizes small` measures this machine instead")
    load = Load(dtype=given.dtype, device=given.device, attention=given.attention, rounds=given.rounds)
    about = facts(load)
    card = re.sub(r"[^a-z0-9]+", "-", str(about["card"]).lower()).strip("-")
    path = given.output or RESULTS / f"gpu-{card}.json"
    measure(given.sizes, given.parts, load, Report(path, about))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
