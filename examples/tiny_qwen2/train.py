"""Trains the small Qwen2 checkpoint and its two adapters from text that ships with Python.

This file decides the model's size, the tokenizer, the schedules and the adapters' LoRA settings.  Every random choice
comes from `--seed`; the same seed, thread count, Python and torch give the same files.

    python examples/tiny_qwen2/train.py --write-readme
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import report
import torch
import transformers
from corpus import Document, read_documents
from measure import Checkpoint
from optimizer import Muon
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from samples import STYLES, Batch, TokenStream, base_batches, style_batches
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
NAME = "tiny_qwen2"
END = "<|endoftext|>"
VOCABULARY = 2048
LENGTH = 256
METRICS = "metrics.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Schedule:
    """How one training runs: a linear warm-up to the optimizers' rates, then a cosine down to nothing."""

    steps: int
    rows: int
    length: int
    warmup: int

    def factor(self, step: int) -> float:
        """What the optimizers' own rates are multiplied by at this step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


BASE_SCHEDULE = Schedule(steps=1300, rows=8, length=LENGTH, warmup=60)
ADAPTER_SCHEDULE = Schedule(steps=400, rows=12, length=144, warmup=20)
MATRIX_RATE = 0.02
VECTOR_RATE = 5e-3  # the base's embeddings and norms
ADAPTER_RATE = 5e-3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Rank, scaling and targets differ, so that code which mixes two adapters up, or leaves the scaling out, shows it.
ADAPTERS = {
    "upper": LoraConfig(
        r=8, lora_alpha=16, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "bullets": LoraConfig(
        r=16, lora_alpha=16, target_modules=[*ATTENTION, "up_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
}


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """Byte-level BPE; every second document also counts in upper case, or upper-case text would fall into letters."""
    tokenizer = Tokenizer(models.BPE())
    # AutoTokenizer gives every Qwen2 folder Qwen2's own splitting, whatever the folder says: so it is trained with that.
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [document.text for document in documents]
    tokenizer.train_from_iterator(texts + [text.upper() for text in texts[::2]], trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer as transformers saves it."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=2 * LENGTH
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def check_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Raises where AutoTokenizer and tokenizer.json disagree: the model would be fed ids it was not trained on."""
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*texts, *(text.upper() for text in texts)]:
        if loaded(text)["input_ids"] != plain.encode(text).ids:
            raise ValueError(f"AutoTokenizer and tokenizer.json split differently: {text[:80]!r}")


def build_model(end_id: int) -> Any:
    """About 0.9 M parameters; two query heads share one key and value head, so the grouped path is used."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2 * LENGTH,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end_id, pad_token_id=end_id, do_sample=False)
    return model


def base_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings and the vectors."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    return [Muon(matrices, lr=MATRIX_RATE), adamw(others, VECTOR_RATE)]


def adamw(parameters: Sequence[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.97), weight_decay=0.0)


def train(
    model: Any,
    batches: Iterator[Batch],
    schedule: Schedule,
    optimizers: Sequence[torch.optim.Optimizer],
    title: str,
    console: Console,
) -> None:
    """Runs one schedule over the parameters that the optimizers hold."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    recent: deque[float] = deque(maxlen=50)
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=schedule.steps)
        for step, batch in enumerate(islice(batches, schedule.steps), start=1):
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * schedule.factor(step - 1)
            loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recent.append(loss.item())
            line = f"{title}  step {step} of {schedule.steps}  loss {sum(recent) / len(recent):.3f}"
            progress.update(task, advance=1, description=line)
            if not console.is_terminal and step % 100 == 0:
                console.print(line)
    model.eval()


def train_base(documents: Sequence[Document], folder: Path, seed: int, console: Console) -> Checkpoint:
    """Tokenizer and model, trained and saved."""
    tokenizer = train_tokenizer(documents)
    end_id = wrap_tokenizer(tokenizer).eos_token_id
    texts = [document.text for document in documents]
    plain = TokenStream(texts, tokenizer, end_id)
    upper = TokenStream([text.upper() for text in texts], tokenizer, end_id)
    model = build_model(end_id)
    batches = base_batches(plain, upper, BASE_SCHEDULE.rows, BASE_SCHEDULE.length, random.Random(seed))
    train(model, batches, BASE_SCHEDULE, base_optimizers(model), "base", console)
    checkpoint = Checkpoint(model, wrap_tokenizer(tokenizer))
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    check_tokenizer(folder, texts)
    readable(folder)
    return checkpoint


def train_adapter(
    name: str, checkpoint: Checkpoint, documents: Sequence[Document], folder: Path, seed: int, console: Console
) -> None:
    """One adapter over the frozen base, trained and saved; the base is left as it was."""
    torch.manual_seed(seed)
    tokenizer, schedule = checkpoint.tokenizer.backend_tokenizer, ADAPTER_SCHEDULE
    batches = style_batches(
        documents, STYLES[name], tokenizer, schedule.rows, schedule.length, random.Random(f"{name} {seed}")
    )
    adapted = get_peft_model(checkpoint.model, ADAPTERS[name])
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    train(adapted, batches, schedule, [adamw(parameters, ADAPTER_RATE)], name, console)
    save_adapter(adapted, folder)
    adapted.unload()


def save_adapter(adapted: Any, folder: Path) -> None:
    """What PEFT saves of an adapter, without what differs from run to run or names this machine."""
    adapted.peft_config["default"].base_model_name_or_path = NAME
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    settings_file = folder / "adapter_config.json"
    settings = json.loads(settings_file.read_text())
    settings["target_modules"].sort()  # PEFT writes a set, whose order differs from run to run
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    readable(folder)


def readable(folder: Path) -> None:
    """safetensors writes files that only their owner can read; these are for everyone."""
    for path in folder.iterdir():
        path.chmod(0o644)


def load(folder: Path, adapter: Path | None = None) -> Checkpoint:
    """What was saved, read back the way a user reads it."""
    model = Qwen2ForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return Checkpoint(model.eval(), transformers.AutoTokenizer.from_pretrained(folder))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small Qwen2 checkpoint and its two adapters.")
    parser.add_argument("--out", type=Path, default=HERE, help="where model/, adapters/ and metrics.json are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure-only", action="store_true", help="measure what --out holds, train nothing")
    parser.add_argument("--write-readme", action="store_true", help="put the measurements into the README")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    documents = read_documents()
    if arguments.measure_only:
        times = {key: json.loads((out / METRICS).read_text())[key] for key in ("seconds", "threads")}
    else:
        started = time.perf_counter()
        train_all([document for document in documents if not document.held_out], out, arguments.seed)
        times = {"seconds": round(time.perf_counter() - started), "threads": arguments.threads}
    checkpoints = {"base": load(out / "model")} | {n: load(out / "model", out / "adapters" / n) for n in ADAPTERS}
    metrics = report.measure(checkpoints, documents, LENGTH) | times
    (out / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if arguments.write_readme:
        report.write_readme(HERE / "README.md", metrics)
    print(json.dumps(metrics, indent=2))


def train_all(documents: Sequence[Document], out: Path, seed: int) -> None:
    """The base and then each adapter over it."""
    console = Console(stderr=True)
    base = train_base(documents, out / "model", seed, console)
    for name in ADAPTERS:
        train_adapter(name, base, documents, out / "adapters" / name, seed, console)


if __name__ == "__main__":
    main()
