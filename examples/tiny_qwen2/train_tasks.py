"""Trains the three adapters of the small Qwen2 that answer with something else than text, and measures them.

`topic` is a sequence classifier whose head travels with it, `similar` makes vectors, `relevant` is a reranker.  This file
decides their LoRA settings, losses and schedules; `tasks.py` decides what they read.  The base is the one in `model/`, left
as it is.

    python examples/tiny_qwen2/train_tasks.py --write-readme
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from corpus import read_documents
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tasks import (
    AREAS,
    CANDIDATES,
    LABELS,
    QUESTIONS,
    Labelled,
    Pair,
    candidate_groups,
    joined,
    labelled,
    labelled_batches,
    padded,
    pair_batches,
    pairs,
    question_batches,
)
from tokenizers import Tokenizer
from train import HERE, Schedule, adamw, save_adapter, train
from transformers import Qwen2ForSequenceClassification, Qwen2Model

Pool = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]

METRICS = "task_metrics.json"
MARKED = re.compile(r"(<!-- measured tasks -->\n).*(<!-- end of measured tasks -->)", re.DOTALL)
GROUP_SEED = 0  # of the retrieval test, whatever the training's seed is

TOPIC_SCHEDULE = Schedule(steps=160, rows=20, length=64, warmup=20)
SIMILAR_SCHEDULE = Schedule(steps=400, rows=32, length=64, warmup=20)
RELEVANT_SCHEDULE = Schedule(steps=400, rows=8, length=128, warmup=20)
TOPIC_RATE = 2.5e-3
RELEVANT_RATE = 2.5e-3
SIMILAR_RATE = 3e-3
TEMPERATURE = 0.05

# Small ranks: what is learned is little, and the files travel with the repository.
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOPIC = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=EVERY, task_type="SEQ_CLS")
SIMILAR = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=EVERY, task_type="FEATURE_EXTRACTION")
RELEVANT = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=EVERY, task_type="SEQ_CLS")


class Choice(torch.nn.Module):
    """Scores the paragraph of the question's area above those of the others."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        scores = self.model(input_ids=input_ids).logits.view(-1, len(LABELS))  # [questions, areas]
        # The second term keeps the scores where the sigmoid of a single one says something.
        wanted = F.one_hot(labels, len(LABELS)).float()
        loss = F.cross_entropy(scores, labels) + F.binary_cross_entropy_with_logits(scores, wanted)
        return SimpleNamespace(loss=loss)


class Contrast(torch.nn.Module):
    """Draws the vectors of two halves together and away from those of the other pairs of the batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        left, right = last_rows(self.model, input_ids, labels).chunk(2)  # each [pairs, dim]
        scores = left @ right.T / TEMPERATURE
        places = torch.arange(len(scores))
        return SimpleNamespace(loss=(F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2)


def last_rows(model: Any, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The unit vectors of the texts' last tokens: a causal model's last row has read the whole text."""
    rows = model(input_ids=ids).last_hidden_state[torch.arange(len(ids)), last]
    return F.normalize(rows, dim=-1)


def mean_rows(model: Any, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The unit vectors of the texts' mean rows."""
    counted = (torch.arange(ids.shape[1]) <= last[:, None]).unsqueeze(-1)
    return F.normalize((model(input_ids=ids).last_hidden_state * counted).sum(1), dim=-1)


def train_topic(model_folder: Path, examples: Sequence[Labelled], folder: Path, seed: int, console: Console) -> None:
    """The classifier with its head, trained and saved."""
    torch.manual_seed(seed)
    model = Qwen2ForSequenceClassification.from_pretrained(model_folder, num_labels=len(LABELS))
    adapted = get_peft_model(model, TOPIC)
    batches = labelled_batches(examples, read_tokenizer(model_folder), TOPIC_SCHEDULE.rows, f"topic {seed}")
    train(adapted, batches, TOPIC_SCHEDULE, [adamw(trained(adapted), TOPIC_RATE)], "topic", console)
    save_adapter(adapted, folder)


def train_similar(model_folder: Path, found: Sequence[Pair], folder: Path, seed: int, console: Console) -> None:
    """The embedding adapter, trained and saved."""
    torch.manual_seed(seed)
    adapted = get_peft_model(Qwen2Model.from_pretrained(model_folder), SIMILAR)
    batches = pair_batches(found, read_tokenizer(model_folder), SIMILAR_SCHEDULE.rows, f"similar {seed}")
    optimizer = adamw(trained(adapted), SIMILAR_RATE)
    train(Contrast(adapted), batches, SIMILAR_SCHEDULE, [optimizer], "similar", console)
    save_adapter(adapted, folder)


def train_relevant(model_folder: Path, examples: Sequence[Labelled], folder: Path, seed: int, console: Console) -> None:
    """The reranker with its head of one label, trained and saved."""
    torch.manual_seed(seed)
    adapted = get_peft_model(Qwen2ForSequenceClassification.from_pretrained(model_folder, num_labels=1), RELEVANT)
    batches = question_batches(examples, read_tokenizer(model_folder), RELEVANT_SCHEDULE.rows, f"relevant {seed}")
    optimizer = adamw(trained(adapted), RELEVANT_RATE)
    train(Choice(adapted), batches, RELEVANT_SCHEDULE, [optimizer], "relevant", console)
    save_adapter(adapted, folder)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_folder / "tokenizer.json"))


@torch.inference_mode()
def measure_topic(model_folder: Path, folder: Path, examples: Sequence[Labelled]) -> dict[str, Any]:
    """How often the saved classifier is right, in all and by area, and what the most frequent area alone would give."""
    bare = Qwen2ForSequenceClassification.from_pretrained(model_folder, num_labels=len(LABELS))
    model = PeftModel.from_pretrained(bare, folder).eval()
    ids, _ = padded([example.text for example in examples], read_tokenizer(model_folder))
    labels = torch.tensor([example.label for example in examples])
    right = model(input_ids=ids).logits.argmax(-1) == labels
    shares = [right[labels == label].float().mean().item() for label in LABELS]
    return {
        "held_out": len(examples),
        "accuracy": round(right.float().mean().item(), 3),
        "most_frequent": round(labels.bincount().max().item() / len(labels), 3),
        "by_area": {name: round(share, 3) for name, share in zip(AREAS, shares, strict=True)},
    }


@torch.inference_mode()
def measure_similar(model_folder: Path, folder: Path, found: Sequence[Pair]) -> dict[str, Any]:
    """How often a left half finds its right half first, with the saved adapter and with the base."""
    tokenizer, groups = read_tokenizer(model_folder), candidate_groups(found, GROUP_SEED)
    base = Qwen2Model.from_pretrained(model_folder).eval()
    shares = {"base_last": top_one(base, last_rows, tokenizer, groups)}
    shares["base_mean"] = top_one(base, mean_rows, tokenizer, groups)
    shares["similar"] = top_one(PeftModel.from_pretrained(base, folder).eval(), last_rows, tokenizer, groups)
    return {"queries": len(groups) * CANDIDATES, "candidates": CANDIDATES} | shares


@torch.inference_mode()
def measure_relevant(model_folder: Path, folder: Path, examples: Sequence[Labelled]) -> dict[str, Any]:
    """How often a paragraph scores highest under the question of its own area, of questions that were never trained on."""
    bare = Qwen2ForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    model, tokenizer = PeftModel.from_pretrained(bare, folder).eval(), read_tokenizer(model_folder)
    asked = [(QUESTIONS[area][-1], example.text) for example in examples for area in AREAS]
    scores = model(input_ids=joined(asked, tokenizer)).logits.view(len(examples), len(AREAS))
    right = scores.argmax(-1) == torch.tensor([example.label for example in examples])
    return {"held_out": len(examples), "relevant": round(right.float().mean().item(), 3)}


def top_one(model: Any, pool: Pool, tokenizer: Tokenizer, groups: Sequence[Sequence[Pair]]) -> float:
    """The share of left halves whose own right half is the nearest of its group."""
    hits = 0
    for group in groups:
        left = pool(model, *padded([pair.left for pair in group], tokenizer))
        right = pool(model, *padded([pair.right for pair in group], tokenizer))
        hits += int(((left @ right.T).argmax(-1) == torch.arange(len(group))).sum())
    return round(hits / sum(map(len, groups)), 3)


def write_readme(path: Path, metrics: Mapping[str, Any]) -> None:
    """Puts the measurements between the README's second pair of marks."""
    text = path.read_text(encoding="utf-8")
    written, count = MARKED.subn(lambda match: f"{match[1]}{table(metrics)}{match[2]}", text)
    if count != 1:
        raise ValueError(f"{path} has no <!-- measured tasks --> block")
    path.write_text(written, encoding="utf-8")


def table(metrics: Mapping[str, Any]) -> str:
    """The figures as the README shows them."""
    topic, similar, relevant = (metrics[name] for name in ("topic", "similar", "relevant"))
    areas = ", ".join(f"{name} {share:.1%}" for name, share in topic["by_area"].items())
    lines = [
        "| Measured | Value |",
        "| --- | --- |",
        f"| `topic`: held-out paragraphs told right | {topic['accuracy']:.1%} of {topic['held_out']} ({areas}) |",
        f"| Always the most frequent area | {topic['most_frequent']:.1%} |",
        f"| `similar`: right half found first | {similar['similar']:.1%} of {similar['queries']},"
        f" among {similar['candidates']} each |",
        f"| `relevant`: paragraphs that score highest under the question of their area | {relevant['relevant']:.1%}"
        f" of {relevant['held_out']} |",
        f"| The base, last token; mean of the tokens | {similar['base_last']:.1%}; {similar['base_mean']:.1%} |",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the adapters that answer with a label or a vector.")
    parser.add_argument("--out", type=Path, default=HERE, help="where adapters/ and the metrics are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("topic", "similar", "relevant"), help="train this one alone")
    parser.add_argument("--measure-only", action="store_true", help="measure what --out holds, train nothing")
    parser.add_argument("--write-readme", action="store_true", help="put the measurements into the README")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    documents, model_folder, console = read_documents(), HERE / "model", Console(stderr=True)
    topic, similar, relevant = (arguments.out / "adapters" / name for name in ("topic", "similar", "relevant"))
    wanted = () if arguments.measure_only else (arguments.only,) if arguments.only else ("topic", "similar", "relevant")
    if "topic" in wanted:
        train_topic(model_folder, labelled(documents, False), topic, arguments.seed, console)
    if "similar" in wanted:
        train_similar(model_folder, pairs(documents, False), similar, arguments.seed, console)
    if "relevant" in wanted:
        train_relevant(model_folder, labelled(documents, False), relevant, arguments.seed, console)
    metrics = {
        "topic": measure_topic(model_folder, topic, labelled(documents, True)),
        "similar": measure_similar(model_folder, similar, pairs(documents, True)),
        "relevant": measure_relevant(model_folder, relevant, labelled(documents, True)),
    }
    (arguments.out / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if arguments.write_readme:
        write_readme(HERE / "README.md", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
