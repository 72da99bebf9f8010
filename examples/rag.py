"""Retrieval-augmented generation from one base: its adapters embed, rerank and write, and nothing else is loaded.

The documents are docstrings of Python's standard library. The steps are those of a large model, the answers are not: of a
model of 0.9 M parameters these are questions for which it finds the right document; its text only sounds like documentation.
"""

import inspect
import random
import shutil
import statistics
import tarfile
import tempfile
import unittest
from pathlib import Path
from types import ModuleType

import lorax_core as lorax

QWEN2 = Path(__file__).resolve().parent / "tiny_qwen2"
MODULES = (random, shutil, statistics, tarfile, tempfile, unittest)
QUESTIONS = ["How do I copy a directory?", "How do I draw a random integer in a range?"]
WRITERS = [None, "upper", "bullets"]  # the base, and two adapters
FOUND, KEPT = 8, 2  # documents that the vectors find, and those of them that the reranker keeps


def documents(module: ModuleType) -> dict[str, str]:
    """The summaries of a module's public functions and classes, each with the name that it belongs to."""
    found: dict[str, str] = {}
    for name, member in inspect.getmembers(module, callable):
        own = str(getattr(member, "__module__", "")).startswith(module.__name__) and not name.startswith("_")
        text = " ".join((inspect.getdoc(member) or "").partition("\n\n")[0].split())
        if own and text.endswith(".") and len(text.split()) >= 6:
            found.setdefault(text, f"{module.__name__}.{name}")
    return found


def main() -> None:
    names = {text: name for module in MODULES for text, name in documents(module).items()}
    texts = list(names)
    adapters = {name: QWEN2 / "adapters" / name for name in ("similar", "relevant", "upper", "bullets")}
    with lorax.load(QWEN2 / "model", adapters=adapters) as engine:
        vectors = engine.embed(texts, adapter="similar", normalize=True)
        print(f"{len(texts)} documents, 1 base, {len(engine.adapters.list())} adapters")
        for question in QUESTIONS:
            scores = vectors @ engine.embed(question, adapter="similar", normalize=True)
            near = [texts[at] for at in (-scores).argsort()[:FOUND]]
            ranked = engine.rerank(question, near, adapter="relevant", top_n=KEPT)
            context = [near[document.index] for document in ranked]
            prompt = "\n".join([question, *reversed(context)])  # the best last, nearest to the answer
            answers = engine.generate([prompt] * len(WRITERS), adapter=WRITERS, max_tokens=32, repetition_penalty=1.15)
            print(f"\n{question}")
            for document, text in zip(ranked, context, strict=True):
                print(f"  {document.score:.2f} {names[text]}: {text:.80}")
            for writer, answer in zip(WRITERS, answers, strict=True):
                print(f"  [{writer or 'base'}] {' / '.join(answer.text.splitlines())}")


if __name__ == "__main__":
    main()
