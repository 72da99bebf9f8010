"""The table adapters x architectures: what PEFT is asked to train on each, and what PEFT then computes alone and unmerged.

Decides the rows and the columns; `tests/adapters/test_matrix.py` proves each cell, and `pages` writes them down.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from builders import BERT, QWEN2, change_tensors
from converted import save_converted, trained_within
from oracles import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from rewrites import half, infix, sharded
from torch import Tensor

TEXTS = [[5, 9, 2, 77, 13], [30, 3, 0, 8, 5], list(range(2, 23))]  # 0 is padding for models that look for it
Options = Mapping[str, Any]
Answer = tuple[list[str] | None, Tensor]
Answers = dict[str, list[Answer]]


@dataclass(frozen=True)
class Arch:
    """One column. Names are those of its checkpoints: a matrix that is fused or a part of it, and others."""

    name: str
    base: type
    token: type
    sequence: type
    config: Options
    part: str
    dense: str
    embedding: str
    norm: str
    head: str | None = None
    tied: bool = False
    transposed: bool = False  # its matrices, as stored
    last: str = "classifier"  # what its sequence classifier saves

    @property
    def generates(self) -> bool:
        """Whether it continues texts."""
        return self.head is not None

    def model(self) -> Any:
        """The base, of transformers."""
        return make_model(self.base, self.config, seed=3)

    def task_model(self, kind: type, base: Any, labels: int, **changes: Any) -> Any:
        """A classifier with the backbone of `base`, as somebody would train it."""
        model = make_model(kind, {**self.config, **changes}, seed=4, num_labels=labels)
        missing, _ = model.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
        assert not missing
        return model


_GPT = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_NEOX = {**_GPT, "intermediate_size": 96, "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": 3}
_GPT2 = {"vocab_size": 200, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96, "pad_token_id": 0}
_NONE = {"bos_token_id": None, "eos_token_id": 3}
_ENCODER = {"part": "value", "dense": "intermediate.dense", "embedding": "word_embeddings"}
_QWEN2 = {
    "base": hf.Qwen2ForCausalLM,
    "token": hf.Qwen2ForTokenClassification,
    "sequence": hf.Qwen2ForSequenceClassification,
    "part": "up_proj",
    "dense": "o_proj",
    "embedding": "embed_tokens",
    "norm": "post_attention_layernorm",
    "head": "lm_head",
    "last": "score",
}
ARCHS = (
    Arch(
        **{"name": "bert", "base": hf.BertModel, "norm": "attention.output.LayerNorm", "config": BERT, **_ENCODER},
        token=hf.BertForTokenClassification,
        sequence=hf.BertForSequenceClassification,
    ),
    Arch(
        **{"name": "roberta", "base": hf.RobertaModel, "norm": "attention.output.LayerNorm", **_ENCODER},
        token=hf.RobertaForTokenClassification,
        sequence=hf.RobertaForSequenceClassification,
        config={**BERT, "pad_token_id": 1, "type_vocab_size": 1},
    ),
    Arch(
        "gpt2",
        hf.GPT2LMHeadModel,
        hf.GPT2ForTokenClassification,
        hf.GPT2ForSequenceClassification,
        {**_GPT2, **_NONE},
        part="c_attn",
        dense="c_fc",
        embedding="wte",
        norm="ln_2",
        head="lm_head",
        tied=True,
        transposed=True,
        last="score",
    ),
    Arch(
        "gpt_neox",
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXForTokenClassification,
        hf.GPTNeoXForSequenceClassification,
        _NEOX,
        part="query_key_value",
        dense="dense_h_to_4h",
        embedding="embed_in",
        norm="post_attention_layernorm",
        head="lm_head",
        last="score",
    ),
    Arch("qwen2", config={**QWEN2, "pad_token_id": 0}, **_QWEN2),
    Arch("qwen2, tied", config={**QWEN2, "pad_token_id": 0, "tie_word_embeddings": True}, tied=True, **_QWEN2),
)


@dataclass(frozen=True)
class Row:
    """One kind of adapter. `options` of PEFT, None where an architecture has no such thing; `rewrite` changes the files."""

    options: Callable[[Arch], Options | None]
    rewrite: Callable[[Path], None] | None = None
    bare: bool = False  # trained on the model without its head
    new_base: bool = False  # with other base weights in the files
    converted: bool = False  # from a start inside the base's weights


def _on(*places: str, **options: Any) -> Callable[[Arch], Options]:
    """LoRA on the modules that an architecture calls `part`, `dense` and so on."""
    return lambda arch: {"target_modules": [getattr(arch, place) for place in places], **options}


def _headed(arch: Arch, **options: Any) -> Options | None:
    return {"target_modules": [arch.head, arch.dense], **options} if arch.head else None


def _patterns(arch: Arch) -> Options:
    return {
        "target_modules": [arch.part, arch.dense],
        "rank_pattern": {arch.part: 5, rf".*\.1\..*{arch.dense}": 2},
        "alpha_pattern": {rf".*\.0\..*{arch.dense}": 3},
    }


ROWS: dict[str, Row] = {
    "every linear layer (`all-linear`)": Row(lambda arch: {"target_modules": "all-linear"}),
    "a fused layer, or one part of it": Row(_on("part")),
    "`target_modules` as a regular expression": Row(lambda arch: {"target_modules": rf".*\.1\..*{arch.dense}"}),
    "`exclude_modules`": Row(lambda arch: {"target_modules": "all-linear", "exclude_modules": [arch.dense]}),
    "`layers_to_transform`": Row(_on("part", "dense", layers_to_transform=[1])),
    "rank 1": Row(_on("part", "dense", r=1)),
    "rank 256": Row(_on("dense", r=256)),
    "`lora_alpha` unequal to rank": Row(_on("part", r=3, lora_alpha=7)),
    "`use_rslora`": Row(_on("part", "dense", r=4, lora_alpha=6, use_rslora=True)),
    "`rank_pattern`, `alpha_pattern`": Row(_patterns),
    "DoRA": Row(lambda arch: {"target_modules": "all-linear", "use_dora": True}),
    "DoRA on a fused layer, or one part of it": Row(_on("part", use_dora=True)),
    "`lora_bias`": Row(_on("part", "dense", lora_bias=True)),
    '`bias="all"`': Row(_on("part", bias="all")),
    '`bias="lora_only"`': Row(_on("part", "dense", bias="lora_only")),
    "token embedding": Row(_on("embedding", "part")),
    "token embedding, DoRA": Row(_on("embedding", use_dora=True)),
    "output head": Row(_headed),
    "output head, DoRA": Row(partial(_headed, use_dora=True)),
    "`modules_to_save`: norms": Row(lambda arch: {"target_modules": [arch.part], "modules_to_save": [arch.norm]}),
    '`modules_to_save`: norms, `bias="all"`': Row(
        lambda arch: {"target_modules": [arch.part], "modules_to_save": [arch.norm], "bias": "all"}
    ),
    "`modules_to_save`: linear layers": Row(
        lambda arch: {"target_modules": [arch.part], "modules_to_save": [arch.dense]}
    ),
    "`modules_to_save`: token embedding": Row(
        lambda arch: {"target_modules": [arch.part], "modules_to_save": [arch.embedding]}
    ),
    "`modules_to_save`: output head": Row(
        lambda arch: {"target_modules": [arch.part], "modules_to_save": [arch.head]} if arch.head else None
    ),
    "`trainable_token_indices`": Row(
        lambda arch: {"target_modules": [arch.part], "trainable_token_indices": {arch.embedding: [9, 2, 5]}}
    ),
    "output head and trained tokens, tied": Row(
        lambda arch: _headed(arch, trainable_token_indices={arch.embedding: [9, 2, 5]}) if arch.tied else None
    ),
    "`ensure_weight_tying`": Row(
        lambda arch: (
            {"target_modules": [arch.part], "modules_to_save": [arch.embedding], "ensure_weight_tying": True}
            if arch.tied
            else None
        )
    ),
    "`base_layer` weights unlike the base's": Row(_on("part", "dense"), new_base=True),
    "`base_layer` of the token embedding unlike the base's": Row(_on("embedding"), new_base=True),
    "trained on the model without its head": Row(_on("part", "dense"), bare=True),
    "PiSSA, converted": Row(_on("part", "dense", init_lora_weights="pissa"), converted=True),
    "PiSSA with `use_rslora`, converted": Row(
        _on("part", "dense", init_lora_weights="pissa", use_rslora=True, lora_alpha=6), converted=True
    ),
    "PiSSA with `rank_pattern`, `alpha_pattern`, converted": Row(
        lambda arch: {**_patterns(arch), "init_lora_weights": "pissa"}, converted=True
    ),
    # PEFT's OLoRA takes a transposed matrix as it is: it cannot be made where that is not square.
    "OLoRA, converted": Row(
        lambda arch: None if arch.transposed else _on("part", "dense", init_lora_weights="olora")(arch), converted=True
    ),
    "CorDA, converted": Row(_on("part", "dense", init_lora_weights="corda"), converted=True),
    "LoRA-GA, converted": Row(_on("part", "dense", init_lora_weights="lora_ga"), converted=True),
    "float16 files": Row(_on("part", "dense"), half),
    "adapter name in the tensors' names": Row(_on("part", "dense"), infix),
    "files in shards": Row(_on("part", "dense"), sharded),
}


@dataclass(frozen=True)
class HeadRow:
    """One kind of classifying adapter, which brings a head for `labels` labels."""

    task: str  # PEFT's
    labels: int
    options: Callable[[Arch], Options]
    load: Options = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Its labels."""
        given = self.load.get("id2label") or {}
        return [given.get(at, f"LABEL_{at}") for at in range(self.labels)]

    def scores(self, logits: Tensor) -> Answer:
        """The answer that its logits mean."""
        if self.task == "TOKEN_CLS":
            best = logits.softmax(-1).max(-1)
            return [self.names[at] for at in best.indices.tolist()], best.values
        if self.load.get("problem_type") == "multi_label_classification":
            values = logits[0].sigmoid()
        else:
            values = logits[0].softmax(-1) if self.labels > 1 else logits[0]
        order = values.argsort(descending=True, stable=True)
        return [self.names[at] for at in order.tolist()], values[order]


_NER = {"id2label": {0: "O", 1: "B-A", 2: "I-A", 3: "B-B", 4: "I-B"}}
HEADS: dict[str, HeadRow] = {
    "token labels, with `id2label`": HeadRow("TOKEN_CLS", 5, _on("part", "dense"), _NER),
    "token labels, DoRA and biases": HeadRow("TOKEN_CLS", 2, _on("part", use_dora=True, bias="lora_only")),
    "token labels, as many as the model is wide": HeadRow("TOKEN_CLS", 64, _on("dense")),
    "text labels, every linear layer": HeadRow("SEQ_CLS", 3, lambda arch: {"target_modules": "all-linear"}),
    "text labels, norms and biases": HeadRow(
        "SEQ_CLS",
        7,
        lambda arch: {"target_modules": [arch.part], "bias": "all", "modules_to_save": [arch.norm, arch.last]},
    ),
    "text labels, several at once": HeadRow(
        "SEQ_CLS", 4, _on("embedding"), {"problem_type": "multi_label_classification"}
    ),
    "text to one number": HeadRow("SEQ_CLS", 1, _on("part", "dense")),
}


def trained(model: Any, seed: int, *, new_base: bool = False, **options: Any) -> PeftModel:
    """PEFT on `model`, with everything that training could change set to random numbers."""
    told = (options.get("target_modules"), options.get("modules_to_save"))
    places = [place for one in told if isinstance(one, list) for place in one]  # now, as PEFT writes into its lists
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out by itself, and nothing tied is merged here
        lora = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options})).eval()
    changed = [name for name, tensor in lora.named_parameters() if tensor.requires_grad]
    found = (any(f".{place}." in name for name in changed) for place in places)
    assert options.get("exclude_modules") or all(found)  # PEFT passes over what is not there
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lora.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "magnitude" in name:
                tensor.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                tensor.copy_(0.5 * noise * tensor.shape[-1] ** -0.5)
            elif tensor.requires_grad or (new_base and name.endswith("base_layer.weight")):
                tensor.add_(noise * (0.3 if tensor.ndim == 1 else 0.5 * tensor.shape[-1] ** -0.5))
            if tensor.requires_grad:
                tensor.copy_(tensor.half())  # so that float16 files hold the same numbers
    return lora


def saved(lora: PeftModel, folder: Path, row: Row | None = None) -> Path:
    """The adapter's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.save_pretrained(str(folder), save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    if row is not None and row.new_base:
        new = {name: t for name, t in lora.state_dict().items() if name.endswith("base_layer.weight")}
        change_tensors(file, lambda found: {**found, **new})
    if row is not None and row.rewrite is not None:
        row.rewrite(file)
    return folder


@torch.inference_mode()
def answers(model: Any, head: HeadRow | None = None) -> Answers:
    """What a model of transformers says of every text, each alone, by kind of request."""
    found: Answers = {}
    for ids in TEXTS:
        row = torch.tensor([ids])
        out = model(input_ids=row, attention_mask=torch.ones_like(row), output_hidden_states=True)
        found.setdefault("embed", []).append((None, out.hidden_states[-1][0].mean(0)))  # [hidden]
        if head is not None:
            found.setdefault("classify", []).append(
                head.scores(out.logits[0] if head.task == "TOKEN_CLS" else out.logits)
            )
        elif "logits" in out:
            chances = out.logits[0, :-1].log_softmax(-1)
            found.setdefault("generate", []).append((None, chances[range(len(ids) - 1), ids[1:]]))
    return found


def make_cell(
    arch: Arch, base: Any, row: Row, folder: Path, seed: int = 1, head: HeadRow | None = None
) -> tuple[Path, Answers] | None:
    """The files of an adapter and what PEFT computes with it; None where the architecture has no such thing.

    `head` is the one that `base` has, if it classifies.
    """
    options = row.options(arch)
    if options is None:
        return None
    model = copy.deepcopy(base)
    if hasattr(model, "pooler"):
        model.pooler = None  # saved with the base for those who need it; vectors do not
    if row.converted:  # the oracle is what was trained, on its own changed base
        changed = trained_within(model, folder, seed, TEXTS, **options)
        expected = answers(changed)
        return save_converted(changed, folder), expected
    lora = trained(model.base_model if row.bare else model, seed, new_base=row.new_base, **options)
    return saved(lora, folder, row), answers(model, head)


def make_head_cell(arch: Arch, base: Any, row: HeadRow, folder: Path, seed: int = 2) -> tuple[Path, Answers]:
    """The same of a classifying adapter, trained on the task's own class."""
    kind = arch.token if row.task == "TOKEN_CLS" else arch.sequence
    model = arch.task_model(kind, base, row.labels)
    lora = trained(model, seed, task_type=row.task, **row.options(arch))
    return saved(lora, folder), answers(model, row)
