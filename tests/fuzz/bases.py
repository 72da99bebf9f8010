"""The checkpoints and adapters that campaigns mutate: made once for a run, by the libraries that serve as references."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from builders import (
    BERT,
    CHAT_TEMPLATE,
    QWEN2,
    change_json,
    make_byte_tokenizer,
    make_letter_tokenizer,
    make_sentence_files,
    randomise,
)
from safetensors.torch import save_file

_GPT2 = {
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "bos_token_id": None,
    "eos_token_id": 256,
}
_NEOX = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
_ROBERTA = {**BERT, "pad_token_id": 1, "type_vocab_size": 1}
_DISTIL = {"vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 96}


@dataclass(frozen=True)
class Base:
    """One checkpoint. `oracle` is the class of transformers that its answers are compared with."""

    name: str
    oracle: type
    config: Mapping[str, Any]
    tokenizer: str  # "bytes" or "letters"

    @property
    def generates(self) -> bool:
        return (
            self.tokenizer == "bytes" and "ForCausalLM" in self.oracle.__name__
        ) or self.oracle is hf.GPT2LMHeadModel


_SEVEN = {"id2label": {0: "A", 1: "B", 2: "C"}, "label2id": {"A": 0, "B": 1, "C": 2}}
BASES = {
    base.name: base
    for base in (
        Base("qwen2", hf.Qwen2ForCausalLM, QWEN2, "bytes"),
        Base("gpt2", hf.GPT2LMHeadModel, _GPT2, "bytes"),
        Base("neox", hf.GPTNeoXForCausalLM, _NEOX, "bytes"),
        Base("bert", hf.BertModel, BERT, "letters"),
        Base("roberta", hf.RobertaModel, _ROBERTA, "letters"),
        Base("distilbert", hf.DistilBertModel, _DISTIL, "letters"),
        Base("bert-tokens", hf.BertForTokenClassification, {**BERT, **_SEVEN}, "letters"),
        Base("bert-texts", hf.BertForSequenceClassification, {**BERT, **_SEVEN}, "letters"),
        Base("bert-pairs", hf.BertForSequenceClassification, {**BERT, "num_labels": 1}, "letters"),
        Base("qwen2-texts", hf.Qwen2ForSequenceClassification, {**QWEN2, "pad_token_id": 0, **_SEVEN}, "bytes"),
    )
}

# Kinds of adapters by the options that PEFT is given; names of modules are those of each architecture.
_PARTS = {
    "qwen2": ("up_proj", "v_proj", "embed_tokens"),
    "gpt2": ("c_fc", "c_attn", "wte"),
    "bert": ("intermediate.dense", "value", "word_embeddings"),
}
ADAPTER_BASES = tuple(_PARTS)


def _kinds(name: str) -> dict[str, dict[str, Any]]:
    dense, part, embedding = _PARTS[name]
    norm = {"qwen2": "post_attention_layernorm", "gpt2": "ln_2", "bert": "attention.output.LayerNorm"}[name]
    return {
        "plain": {"target_modules": [dense, part]},
        "all": {"target_modules": "all-linear"},
        "rslora": {"target_modules": [dense], "use_rslora": True, "lora_alpha": 6},
        "patterns": {"target_modules": [dense, part], "rank_pattern": {part: 5}, "alpha_pattern": {dense: 3}},
        "dora": {"target_modules": [dense], "use_dora": True},
        "bias": {"target_modules": [part, dense], "bias": "all"},
        "lora_bias": {"target_modules": [dense], "lora_bias": True},
        "saved": {"target_modules": [part], "modules_to_save": [norm]},
        "embedding": {"target_modules": [embedding, part]},
        "tokens": {"target_modules": [part], "trainable_token_indices": {embedding: [9, 2, 5]}},
    }


ADAPTER_KINDS = tuple(_kinds("qwen2"))


def make_model(base: Base) -> Any:
    """The random model of a base."""
    model = base.oracle._from_config(base.oracle.config_class(**base.config), attn_implementation="eager").eval()
    randomise(model, 3)
    return model


@contextlib.contextmanager
def quiet() -> Any:
    """Without what the references print and warn of."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def build(root: Path) -> Path:
    """All bases below `root`: `root/NAME`, adapters in `root/adapters/NAME-KIND`, Medusa heads in `root/adapters/medusa`."""
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    with quiet():
        for base in BASES.values():
            model = make_model(base)
            model.save_pretrained(root / base.name)
            tokenizer = make_byte_tokenizer(CHAT_TEMPLATE) if base.tokenizer == "bytes" else make_letter_tokenizer()
            tokenizer.save_pretrained(root / base.name)
            if base.name in _PARTS:
                for kind, options in _kinds(base.name).items():
                    _adapter(base, root / "adapters" / f"{base.name}-{kind}", options)
        _sentence(root)
        _sharded(root)
    _medusa(root / "adapters/medusa")
    return root


def _adapter(base: Base, folder: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model(base)
    lora = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in lora.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 * tensor.shape[-1] ** -0.5)
            elif tensor.requires_grad:  # saved modules, biases, magnitudes, trained tokens
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    lora.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT writes a set, in the order of the process; a case must be the same in all.
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    change_json(
        folder / "adapter_config.json", target_modules=sorted(targets) if isinstance(targets, list) else targets
    )


def _sentence(root: Path) -> None:
    folder = root / "sentence"
    make_model(BASES["bert"]).save_pretrained(folder)
    make_letter_tokenizer().save_pretrained(folder)
    make_sentence_files(
        folder,
        modules=("Transformer", "Pooling", "Dense", "Normalize"),
        sentence={"prompts": {"query": "q: ", "x": ""}},
    )
    dense = folder / "2_Dense"
    activation = "torch.nn.modules.activation.Tanh"
    change_json(dense / "config.json", in_features=64, out_features=24, bias=True, activation_function=activation)
    generator = torch.Generator().manual_seed(7)
    weight, bias = torch.randn(24, 64, generator=generator) / 8, torch.randn(24, generator=generator)
    save_file({"linear.weight": weight, "linear.bias": bias}, dense / "model.safetensors", metadata={"format": "pt"})


def _sharded(root: Path) -> None:
    folder = root / "sharded"
    make_model(BASES["qwen2"]).save_pretrained(folder, max_shard_size="100KB")
    make_byte_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)


def _medusa(folder: Path) -> None:
    change_file = folder / "config.json"
    folder.mkdir(parents=True)
    change_json(change_file, medusa_num_heads=2, medusa_num_layers=1, base_model_name_or_path="tiny")
    generator = torch.Generator().manual_seed(9)
    hidden, vocab = QWEN2["hidden_size"], QWEN2["vocab_size"]
    tensors = {}
    for head in range(2):
        tensors[f"{head}.0.linear.weight"] = torch.randn(hidden, hidden, generator=generator) / 8
        tensors[f"{head}.0.linear.bias"] = torch.randn(hidden, generator=generator)
        tensors[f"{head}.1.weight"] = torch.randn(vocab, hidden, generator=generator) / 8
    save_file(tensors, folder / "medusa_lm_head.safetensors", metadata={"format": "pt"})
