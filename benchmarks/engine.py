"""What the engine costs and saves, against transformers in the same run.

    python benchmarks/engine.py [--size 0.5b|small] [--batch 16] [--tokens 32] [--json]

Four questions, on a Qwen2 of random weights (answers are not read, only timed):

1. tokens per second of a mixed load, against transformers' `generate` in one static batch and one request at a time;
2. the share of a step that is not the model;
3. what prefix reuse saves;
4. how planning grows with the number of waiting requests.

Machines are noisy: read the ratios of one run, not the seconds of two.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lorax_core as lorax
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import Sequence
from lorax_core.engine.stopping import StopRule
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.types import Task

SIZES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    },
}
talk = Console(stderr=True)


def make_model(size: str, folder: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A Qwen2 of random weights, saved to `folder`; gives the transformers model."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(**{"tie_word_embeddings": True, "max_position_embeddings": 16_384, **SIZES[size]})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.save_pretrained(folder)
    return model


def make_prompts(count: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 16 to 128 random tokens."""
    source = random.Random(seed)
    return [[source.randrange(vocab) for _ in range(source.randint(16, 128))] for _ in range(count)]


def timed(job: Callable[[], object]) -> float:
    """Seconds that a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def throughput(model: Any, engine: lorax.Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Generated tokens per second: ours, one static padded batch, and one request at a time."""
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    some = prompts[: max(len(prompts) // 4, 1)]

    def one_by_one() -> None:
        for prompt in some:
            ids = torch.tensor([prompt])
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    engine.generate(prompts[0], max_tokens=2, ignore_eos=True)
    ours = timed(lambda: engine.generate(prompts, max_tokens=tokens, ignore_eos=True))
    with torch.inference_mode():
        batched = timed(lambda: model.generate(input_ids=padded, attention_mask=mask, **settings))
        single = timed(one_by_one)
    return {
        "lorax_tokens_per_second": len(prompts) * tokens / ours,
        "transformers_batch_tokens_per_second": len(prompts) * tokens / batched,
        "transformers_single_tokens_per_second": len(some) * tokens / single,
        "times_transformers_batch": batched / ours,
    }


def overhead(engine: lorax.Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """The share of decoding steps that is not the model: planning, packing, sampling, accepting."""
    shares: list[float] = []

    def measure(loop: Any) -> None:
        model, spent = loop._runner._model, [0.0]
        plain = model.forward

        def clocked(batch: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(batch)
            finally:
                spent[0] += time.perf_counter() - start

        model.forward = clocked
        try:
            for prompt in prompts:
                loop.add(Sequence(task=Task.GENERATE, prompt=list(prompt), stop=StopRule(tokens)))
            while loop.busy:
                before = spent[0]
                took = timed(loop.step)
                shares.append(1 - (spent[0] - before) / took)
        finally:
            del model.forward

    engine._worker.call(measure)
    return {"share_not_model": statistics.median(shares)}


def prefix(engine: lorax.Engine, vocab: int) -> dict[str, float]:
    """Seconds until the first token of a long prompt, computed and found."""
    source = random.Random(7)
    prompt = [source.randrange(vocab) for _ in range(1024)]
    cold = timed(lambda: engine.generate(prompt, max_tokens=1))
    warm = timed(lambda: engine.generate(prompt, max_tokens=1))
    reused = engine.generate(prompt, max_tokens=1).usage.cached_tokens
    return {"prompt_seconds": cold, "found_seconds": warm, "times_faster": cold / warm, "tokens_found": float(reused)}


def planning(counts: tuple[int, ...] = (10, 100, 1_000, 10_000)) -> dict[str, float]:
    """Microseconds of planning for each planned token, by the number of requests that wait."""
    costs: dict[str, float] = {}
    for count in counts:
        scheduler = Scheduler(max_tokens=512, max_rows=64, allocator=PageAllocator(4096, 16))
        for _ in range(count):
            scheduler.add(Sequence(task=Task.GENERATE, prompt=[1] * 8, stop=StopRule(32)))
        planned, spent = 0, 0.0
        for _ in range(200):
            start = time.perf_counter()
            plan = scheduler.plan()
            for chunk in plan.chunks:
                chunk.sequence.output.append(2)
                scheduler.advance(chunk)
            spent += time.perf_counter() - start
            planned += plan.tokens
            for chunk in plan.chunks:
                if len(chunk.sequence.output) >= 32:
                    scheduler.remove(chunk.sequence)
            if not len(scheduler):
                break
        costs[f"{count}_waiting"] = spent / planned * 1e6
    return costs


def show(results: dict[str, dict[str, float]]) -> None:
    """A table on stdout."""
    table = Table("question", "figure", "value")
    for question, figures in results.items():
        for name, value in figures.items():
            table.add_row(question, name, f"{value:,.3f}")
    Console().print(table)


def main() -> None:
    """Run the four measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        talk.print(f"making a random Qwen2 of size {options.size} …")
        model = make_model(options.size, folder)
        vocab = int(SIZES[options.size]["vocab_size"])
        prompts = make_prompts(options.batch, vocab)
        with lorax.load(folder, kv_cache_tokens=16_384) as engine:
            results = {"planning (us a token)": planning()}
            talk.print("decoding steps …")
            results["overhead"] = overhead(engine, make_prompts(options.batch, vocab, seed=1), options.tokens)
            talk.print("prefix reuse …")
            results["prefix reuse"] = prefix(engine, vocab)
            talk.print("throughput, ours and transformers' …")
            results["throughput"] = throughput(model, engine, prompts, options.tokens)
    if options.json:
        sys.stdout.write(json.dumps({"size": options.size, "threads": torch.get_num_threads(), **results}) + "\n")
    else:
        show(results)


if __name__ == "__main__":
    main()
