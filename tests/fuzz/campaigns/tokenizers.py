"""What stands beside a checkpoint's weights and configuration: tokenizers, and the files of sentence-transformers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.campaigns.checkpoints import put_code, ran_code
from fuzz.house import PROBE, House
from fuzz.judge import Answer, Attempt
from fuzz.mutations import change_json_file, change_tensor_values

STRINGS = [
    "hello world",
    "The é\U0001f600 in\nthe\tthird",
    " a<|end|>b ",
    "[CLS] x [MASK]",
    "",
    "\u2028\u0301z",
    "the " * 12,
]


def tokenizer(house: House, random: Random) -> Attempt:
    """`tokenizer.json` and the small files beside it."""
    name = random.choice(["qwen2", "bert", "gpt2"])
    folder = house.copy(name)
    changes = [f"base {name}"]
    for _ in range(random.choice([1, 1, 2])):
        which = random.choice(
            [
                "tokenizer.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
                "new",
            ]
        )
        file = folder / which
        if which == "new":
            other = random.choice(["vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"])
            (folder / other).write_bytes(
                random.choice([b"", b"a\nb\n", b'{"a": 0}', b"\xff\xfe", b"#version: 0.2\na b\n"])
            )
            changes.append(f"{other} added")
            continue
        if not file.exists() and not file.is_symlink():
            file.write_text(
                random.choice(['{"eos_token": "<|end|>"}', '{"bos_token": {"content": "x"}}', '{"new": 400}'])
            )
        with contextlib.suppress(Exception):
            changes += change_json_file(file, random, random.choice([1, 1, 3]))
    if random.random() < 0.08:
        changes.append(_foreign_tokenizer(folder, random))
    texts = random.sample(STRINGS, 3)
    same = len(changes) == 1

    def ask() -> Answer:
        with house.load(folder, name) as engine:
            found: dict[str, Any] = {}
            for at, text in enumerate(texts):
                found[f"count {at}"] = engine.count_tokens(text) if text else 0
            found["vector"] = [float(number) for number in engine.embed(texts[0] or "x")]
            if "generate" in engine.info().tasks:
                done = engine.generate(PROBE, max_tokens=6, ignore_eos=True)
                found["tokens"], found["text"] = list(done.token_ids), done.text
            return found

    def refer(answer: Answer, seed: int) -> Answer:
        from transformers import AutoTokenizer

        read = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        found: dict[str, Any] = {
            f"count {at}": len(read(text)["input_ids"]) if text else 0 for at, text in enumerate(texts)
        }
        made = read(texts[0] or "x")
        model = house.reference(name).base_model
        types = (
            {"token_type_ids": torch.tensor([made["token_type_ids"]])}
            if "token_type_ids" in made and name == "bert"
            else {}
        )
        with torch.inference_mode():
            found["vector"] = model(torch.tensor([made["input_ids"]]), **types).last_hidden_state[0].mean(0).tolist()
        if "tokens" in answer:
            found["tokens"] = answer["tokens"]
            found["text"] = read.decode(answer["tokens"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    return Attempt(ask, refer, changes=changes, same=same, check=lambda: ran_code(folder))


def _foreign_tokenizer(folder: Path, random: Random) -> str:
    """A tokenizer that is code of the checkpoint, behind a model type that transformers may not know."""
    put_code(folder)
    file = folder / "tokenizer_config.json"
    with contextlib.suppress(Exception):
        found = json.loads(file.read_text())
        found["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        found["tokenizer_class"] = random.choice(["Evil", "EvilTokenizerFast", None])
        file.write_text(json.dumps(found))
    return "tokenizer_config.json: auto_map names code"


def sentence(house: House, random: Random) -> Attempt:
    """The files of sentence-transformers beside a checkpoint, a dense layer among them."""
    folder = house.copy("sentence")
    files = [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ]
    changes: list[str] = []
    for _ in range(random.choice([1, 1, 2])):
        with contextlib.suppress(Exception):
            if random.random() < 0.2:
                changes.append(change_tensor_values(folder / "2_Dense/model.safetensors", random))
            elif random.random() < 0.45:
                changes.append(_plausible_sentence(folder, random))
            else:
                changes += change_json_file(folder / random.choice(files), random, random.choice([1, 1, 3]))
    texts = ["ab c", "A b"]

    def ask() -> Answer:
        with house.load(folder, "bert", pooling=None) as engine:
            return {f"vector {at}": [float(x) for x in engine.embed(text)] for at, text in enumerate(texts)}

    def refer(answer: Answer, seed: int) -> Answer:
        from sentence_transformers import SentenceTransformer

        torch.manual_seed(seed)
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
        return {f"vector {at}": [float(x) for x in model.encode(text)] for at, text in enumerate(texts)}

    return Attempt(ask, refer, changes=changes, same=not changes)


_POOLINGS = ["cls", "mean", "max", "lasttoken", "weightedmean", ["mean"], ["mean", "cls"], "x", 5, None, []]
_OF_SENTENCE: dict[str, dict[str, list[Any]]] = {
    "1_Pooling/config.json": {
        "pooling_mode": _POOLINGS, "pooling_mode_cls_token": [True, False], "pooling_mode_mean_tokens": [True, False],
        "pooling_mode_lasttoken": [True, False], "include_prompt": [True, False],
            "word_embedding_dimension": [64, 32, "64", None],
    },
    "sentence_bert_config.json": {"max_seq_length": [None, 4, 8, 96, 97, 10**9, 0, -1, "8", 2.5],
        "do_lower_case": [True, False, None, "no"]},
    "config_sentence_transformers.json": {"default_prompt_name": ["query", "x", "nope", None, 5],
        "prompts": [{"query": "q: "}, {"query": 5}, {}, None, ["q"]]},
    "2_Dense/config.json": {
        "activation_function": ["torch.nn.modules.activation.ReLU", "torch.nn.modules.linear.Identity",
            "torch.nn.GELU", "os.system", 5, None],
        "in_features": [64, 32, "64"], "out_features": [24, 32, None], "bias": [True, False, None],
    },
}  # fmt: skip


def _plausible_sentence(folder: Path, random: Random) -> str:
    name = random.choice(sorted(_OF_SENTENCE))
    file = folder / name
    found = json.loads(file.read_text())
    key = random.choice(sorted(_OF_SENTENCE[name]))
    found[key] = random.choice(_OF_SENTENCE[name][key])
    file.write_text(json.dumps(found))
    return f"{name}: {key} = {found[key]!r}"
