"""Decides which measurements are published, and writes them between two marks of the README beside this file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corpus import Document, words
from measure import (
    BULLET_TOKENS,
    PROMPTS,
    UPPER_TOKENS,
    WORD_TOKENS,
    Checkpoint,
    bullet_lines,
    bullet_share,
    known_word_share,
    perplexity,
    upper_share,
)
from samples import TokenStream

SAMPLE_PROMPTS = ("When an exception is raised", "The event loop", "The input stream")
SAMPLE_TOKENS = 48
_MARKED = re.compile(r"(<!-- measured -->\n).*(<!-- end of measured -->)", re.DOTALL)


def measure(checkpoints: Mapping[str, Checkpoint], documents: Sequence[Document], window: int) -> dict[str, Any]:
    """Everything the README states about "base", "upper" and "bullets"."""
    base = checkpoints["base"]
    vocabulary = frozenset(word for document in documents for word in words(document.text))
    held_out = [document for document in documents if document.held_out]
    stream = TokenStream(
        [document.text for document in held_out], base.tokenizer.backend_tokenizer, base.tokenizer.eos_token_id
    )
    score, tokens = perplexity(base, stream.ids, window)
    return {
        "parameters": sum(parameter.numel() for parameter in base.model.parameters()),
        "documents": len(documents),
        "held_out_documents": len(held_out),
        "held_out_tokens": tokens,
        "held_out_perplexity": round(score, 2),
        "known_word_share": round(known_word_share(base.continuations(WORD_TOKENS), vocabulary), 4),
        "effects": {name: _effects(checkpoint) for name, checkpoint in checkpoints.items()},
        "samples": {
            prompt: {name: checkpoint.greedy(prompt, SAMPLE_TOKENS) for name, checkpoint in checkpoints.items()}
            for prompt in SAMPLE_PROMPTS
        },
    }


def _effects(checkpoint: Checkpoint) -> dict[str, float]:
    """What is upper case and what is a bullet, as a mean and at the prompt that is furthest from the effect."""
    upper = [upper_share(text) for text in checkpoint.continuations(UPPER_TOKENS)]
    lists = checkpoint.continuations(BULLET_TOKENS)
    bullets = [bullet_share(text) for text in lists]
    return {
        "upper_mean": round(sum(upper) / len(upper), 3),
        "upper_least": round(min(upper), 3),
        "upper_most": round(max(upper), 3),
        "bullets_mean": round(sum(bullets) / len(bullets), 3),
        "bullets_least": round(min(bullets), 3),
        "bullets_most": round(max(bullets), 3),
        "bullet_lines_least": min(bullet_lines(text)[0] for text in lists),
    }


def write_readme(path: Path, metrics: Mapping[str, Any]) -> None:
    """Puts the measurements between the README's marks."""
    text = path.read_text(encoding="utf-8")
    block = _tables(metrics) + _samples(metrics["samples"])
    written, count = _MARKED.subn(lambda match: f"{match[1]}{block}{match[2]}", text)
    if count != 1:
        raise ValueError(f"{path} has no <!-- measured --> block")
    path.write_text(written, encoding="utf-8")


def _tables(metrics: Mapping[str, Any]) -> str:
    lines = [
        "| Measured | Value |",
        "| --- | --- |",
        f"| Parameters | {metrics['parameters']:,} |",
        f"| Held-out perplexity per token | {metrics['held_out_perplexity']} |",
        f"| Held-out tokens | {metrics['held_out_tokens']:,} in {metrics['held_out_documents']}"
        f" of {metrics['documents']} documents |",
        f"| Words of greedy text that occur in the corpus | {metrics['known_word_share']:.1%}"
        f" ({len(PROMPTS)} prompts, {WORD_TOKENS} tokens each) |",
    ]
    if "seconds" in metrics:
        lines.append(f"| Seconds to train all three | {metrics['seconds']} with {metrics['threads']} thread(s) |")
    lines += [
        "",
        f"Over {len(PROMPTS)} prompts, greedy, mean (least to most):",
        "",
        f"| | Upper-case letters ({UPPER_TOKENS} tokens) | Lines that are bullets ({BULLET_TOKENS} tokens) |",
        "| --- | --- | --- |",
    ]
    for name, effect in metrics["effects"].items():
        shares = [
            f"{effect[f'{kind}_mean']:.1%} ({effect[f'{kind}_least']:.1%} to {effect[f'{kind}_most']:.1%})"
            for kind in ("upper", "bullets")
        ]
        lines.append(f"| {name} | {shares[0]} | {shares[1]} |")
    return "\n".join([*lines, "", ""])


def _samples(samples: Mapping[str, Mapping[str, str]]) -> str:
    parts = [f"Greedy text, {SAMPLE_TOKENS} tokens, the prompt first:", ""]
    for prompt, texts in samples.items():
        for name, text in texts.items():
            parts += [f"`{name}`", "", "```text", f"{prompt}{text}".rstrip(), "```", ""]
    return "\n".join([*parts, ""])
