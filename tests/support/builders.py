"""What the runtime's tests are made of: tiny checkpoints, tokenizers and adapters, written to real files.

Decides sizes and random numbers, all from seeds. Everything is made by the libraries that serve as oracles
(transformers, tokenizers, PEFT), so no test builds a checkpoint in our own image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

QWEN2 = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
}
BERT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 96,
    "type_vocab_size": 2,
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every tensor of a model, new: matrices of unit gain, biases that count, norm weights around one.

    Tied tensors stay tied. Logits come out wide, so that greedy choices do not hang on the last bit.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5 * (3.0 if "embed" in name or "lm_head" in name else 1.0))
            else:
                tensor.copy_(noise * 0.3 + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))


def make_qwen2_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random Qwen2 of transformers, in evaluation mode."""
    model = Qwen2ForCausalLM(Qwen2Config(**{**QWEN2, **changes})).eval()
    randomise(model, seed)
    model.generation_config.eos_token_id = model.config.eos_token_id
    return model


def make_bert_model(seed: int = 0, **changes: Any) -> BertModel:
    """A random BERT of transformers, in evaluation mode."""
    model = BertModel(BertConfig(**{**BERT, **changes})).eval()
    randomise(model, seed)
    return model


def make_qwen2(folder: Path, seed: int = 0, *, tokenizer: bool = True, **changes: Any) -> Path:
    """A random Qwen2 checkpoint, with a tokenizer of bytes unless told otherwise."""
    make_qwen2_model(seed, **changes).save_pretrained(folder)
    if tokenizer:
        make_byte_tokenizer().save_pretrained(folder)
    return folder


def make_bert(folder: Path, seed: int = 0, *, tokenizer: bool = True, **changes: Any) -> Path:
    """A random BERT checkpoint, with a tokenizer of letters unless told otherwise."""
    make_bert_model(seed, **changes).save_pretrained(folder)
    if tokenizer:
        make_letter_tokenizer().save_pretrained(folder)
    return folder


def make_byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: ids 0 to 255 are bytes, 256 is the special end token, then some pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    vocab = {character: index for index, character in enumerate(alphabet)} | {EOS: 256}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("Ã", "©")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS)
    tokenizer.chat_template = chat_template
    return tokenizer


def _byte_of(character: str) -> int:
    """The byte that ByteLevel writes as this character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    at = ord(character)
    return at if at in printable else [byte for byte in range(256) if byte not in printable][at - 256]


def make_letter_tokenizer(max_tokens: int = 96) -> PreTrainedTokenizerFast:
    """WordPiece over single characters, upper and lower case apart, with BERT's special tokens and pairs."""
    signs = [chr(at) for at in range(33, 127)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    made = Tokenizer(models.WordPiece({token: index for index, token in enumerate(vocab)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_tokens,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_lora(model: nn.Module, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A random LoRA adapter for a model of transformers, saved by PEFT. The model itself is left as it was.

    Beside an adapter of the output head PEFT would save the base's own head and embedding; that is left out.
    """
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lora.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 * tensor.shape[-1] ** -0.5)
    lora.save_pretrained(str(folder), save_embedding_layers=False)
    lora.unload()
    return folder


def with_lora(model: nn.Module, folder: Path) -> nn.Module:
    """The oracle: a model of transformers with an adapter that PEFT put on it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def change_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file, made when it is not there; None removes a key."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {key: value for key, value in {**found, **changes}.items() if value is not None}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")


def change_tensors(file: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Rewrites a safetensors file by what `change` gives back for its tensors."""
    changed = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


def make_sentence_files(
    folder: Path,
    *,
    modules: Iterable[str] = ("Transformer", "Pooling", "Normalize"),
    pooling: Mapping[str, Any] | None = None,
    transformer: Mapping[str, Any] | None = None,
    sentence: Mapping[str, Any] | None = None,
) -> Path:
    """The files of old sentence-transformers beside a checkpoint; a normalise entry has no folder, as theirs had none."""
    entries = []
    for index, kind in enumerate(modules):
        path = "" if kind == "Transformer" else f"{index}_{kind}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(entries), encoding="utf-8")
    hidden = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    pooling = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
    change_json(folder / "1_Pooling/config.json", word_embedding_dimension=hidden, **pooling)
    change_json(folder / "sentence_bert_config.json", **(transformer or {"max_seq_length": 64, "do_lower_case": False}))
    if sentence:
        change_json(folder / "config_sentence_transformers.json", **sentence)
    return folder
