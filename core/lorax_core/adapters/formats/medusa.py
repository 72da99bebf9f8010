"""Medusa heads: an adapter that drafts the next tokens but one, two, three and so on, for the model to verify.

Decides what of Medusa's files is supported: heads of residual blocks, each with an output layer of its own or all with the
base's, and beside them a LoRA adapter in the same folder. Knows nothing of verification, which makes every draft harmless.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.adapters.base import Adapter, Bound, fits_dtype
from lorax_core.adapters.deltas import cast_to
from lorax_core.adapters.formats.head import HeadRequest
from lorax_core.adapters.formats.lora import LoraAdapter
from lorax_core.adapters.formats.settings import SETTINGS_BYTES
from lorax_core.adapters.formats.tensors import content, read_tensors
from lorax_core.adapters.formats.text_files import text_digest
from lorax_core.errors import AdapterError, listed
from lorax_core.types import Task
from lorax_core.untrusted import read_json
from lorax_core.weights.loader import LoadedModel

_COUNTS = (("medusa_num_heads", None), ("medusa_num_layers", 1))
_AGAIN = "copy or download the adapter again"
_PREFIX = re.compile(r"^medusa_heads?\.")


@dataclass(frozen=True, slots=True)
class MedusaHead:
    """One head: its residual blocks `x + silu(W x + b)` in order, and its output layer, None where the base's is used."""

    blocks: tuple[tuple[Tensor, Tensor], ...]  # W [hidden, hidden], b [hidden]
    out: Tensor | None  # [vocab, hidden]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        outs = [self.out] if self.out is not None else []
        return [*(tensor for block in self.blocks for tensor in block), *outs]

    def to(self, device: torch.device, dtype: torch.dtype) -> MedusaHead:
        """The same head in this dtype on a device."""
        blocks = tuple((cast_to(weight, device, dtype), cast_to(bias, device, dtype)) for weight, bias in self.blocks)
        return MedusaHead(blocks, cast_to(self.out, device, dtype) if self.out is not None else None)


class MedusaHeads:
    """Heads on a device. Head i drafts the token i + 2 places after the row that it reads."""

    def __init__(self, heads: Sequence[MedusaHead]) -> None:
        self._heads = tuple(heads)

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return sum(tensor.nbytes for head in self._heads for tensor in head.tensors)

    def draft(self, hidden: Tensor, base_logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Most likely tokens `[rows, heads]` after the one that follows each row of hidden `[rows, hidden]`."""
        tokens: list[Tensor] = []
        for head in self._heads:
            # [rows, hidden]; every head starts from the same rows, not from the head before
            x = hidden
            for weight, bias in head.blocks:
                x = x + F.silu(F.linear(x, weight, bias))
            logits = F.linear(x, head.out) if head.out is not None else base_logits(x)  # [rows, vocab]
            tokens.append(logits.argmax(-1))
        return torch.stack(tokens, dim=1)


class MedusaAdapter(Adapter):
    """What Medusa's training saves: `config.json` with `medusa_num_heads` and one safetensors file of heads.

    With PEFT's files in the same folder it is a LoRA adapter too. Raises AdapterError for files that are bad or incomplete.
    """

    kind = "medusa"

    def __init__(self, path: str | Path, head: HeadRequest | None = None, *, shapes_only: bool = False) -> None:
        self.path = Path(path)
        beside = (self.path / "adapter_config.json").is_file()
        self.lora = LoraAdapter(path, head, shapes_only=shapes_only) if beside else None
        if self.lora is None and head is not None and any(setting is not None for setting in head.settings):
            raise AdapterError(
                f"{path} holds Medusa heads alone, which have no task, problem_type or id2label",
                hint="leave task, problem_type and id2label out",
            )
        config = _read_config(self.path)
        self.trained_on: str | None = config.get("base_model_name_or_path")
        self.heads = _read_heads(self.path, config, shapes_only)
        self.identity = "" if shapes_only else self._hash()
        self.task = self.lora.task if self.lora is not None else Task.GENERATE
        self.ranks = self.lora.ranks if self.lora is not None else ()
        self.draft_tokens = len(self.heads)

    def bind(self, base: LoadedModel, *, meta: bool = False) -> Bound:
        model = base.model
        if Task.GENERATE not in model.tasks:
            raise AdapterError(
                f"{self.path} has Medusa heads, which draft tokens; this base generates none",
                hint="load it on a base that generates; `lorax models list --task generate` lists them",
            )
        hidden, vocab = model.config.hidden_size, model.config.vocab_size
        for number, head in enumerate(self.heads):
            wide = [
                weight
                for weight, bias in head.blocks
                if list(weight.shape) != [hidden, hidden] or list(bias.shape) != [hidden]
            ]
            if wide or (head.out is not None and list(head.out.shape) != [vocab, hidden]):
                shapes = [list(tensor.shape) for tensor in head.tensors]
                raise AdapterError(
                    f"{self.path} does not fit: head {number} has shapes {shapes}, the base is {hidden} wide and has "
                    f"{vocab} tokens",
                    hint="load it with the base that it was trained on",
                )
        beside = self.lora.bind(base, meta=meta) if self.lora is not None else Bound()
        device = torch.device("meta") if meta else model.device
        with fits_dtype(f"{self.path}"):
            heads = MedusaHeads([head.to(device, model.dtype) for head in self.heads])
        return Bound(beside.deltas, beside.head, heads, beside.unread)

    def _hash(self) -> str:
        digest = hashlib.sha256((self.lora.identity if self.lora is not None else "medusa").encode())
        for head in self.heads:
            digest.update(f"{len(head.blocks)} blocks".encode())
            for tensor in head.tensors:
                digest.update(content(tensor))
        return digest.hexdigest()


def is_medusa(folder: Path) -> bool:
    """Whether a folder's `config.json` describes Medusa heads."""
    if not (folder / "config.json").is_file():  # PEFT's folders have none
        return False
    return "medusa_num_heads" in _read_config(folder)


def read_adapter(
    folder: Path, head: HeadRequest | None = None, *, shapes_only: bool = False
) -> LoraAdapter | MedusaAdapter:
    """The adapter in a folder, of the kind that its files say; raises AdapterError when they are bad."""
    kind = MedusaAdapter if is_medusa(folder) else LoraAdapter
    adapter = kind(folder, head, shapes_only=shapes_only)
    if not shapes_only and (digest := text_digest(folder)):
        # Equal numbers whose texts are read by other tokenizers or templates are two adapters.
        adapter.identity = hashlib.sha256((adapter.identity + digest).encode()).hexdigest()
    return adapter


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json", AdapterError, SETTINGS_BYTES)
    if not isinstance(config, dict):
        raise AdapterError(f"{folder}/config.json holds no object", hint=_AGAIN)
    return config


def _read_heads(folder: Path, config: dict[str, Any], shapes_only: bool) -> tuple[MedusaHead, ...]:
    stored = dict(read_tensors([_tensor_file(folder)], shapes_only=shapes_only))
    heads, layers = (_count(folder, config, name, default, len(stored)) for name, default in _COUNTS)
    if heads * layers > len(stored):
        raise AdapterError(
            f"{folder} says {heads} Medusa heads of {layers} blocks, and holds {len(stored)} tensors", hint=_AGAIN
        )
    blocks = [
        f"{head}.{layer}.linear.{leaf}"
        for head in range(heads)
        for layer in range(layers)
        for leaf in ("weight", "bias")
    ]
    outs = [f"{head}.{layers}.weight" for head in range(heads)]
    known = {*blocks, *outs}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        key = _PREFIX.sub("", name)
        if key in tensors or key not in known:
            raise AdapterError(
                f"{folder} holds {name!r}, which {heads} Medusa heads of {layers} blocks do not have", hint=_AGAIN
            )
        tensors[key] = tensor
    # One output layer saved means that all must be: the rest may not fall back on the base's.
    wanted = [*blocks, *(outs if any(key in tensors for key in outs) else [])]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise AdapterError(
            f"{folder} lacks {listed(missing)} of {heads} Medusa heads",
            hint="download or copy it again; medusa_num_heads in config.json says how many heads it has",
        )
    return tuple(
        MedusaHead(
            tuple(
                (tensors[f"{head}.{layer}.linear.weight"], tensors[f"{head}.{layer}.linear.bias"])
                for layer in range(layers)
            ),
            tensors.get(f"{head}.{layers}.weight"),
        )
        for head in range(heads)
    )


def _count(folder: Path, config: dict[str, Any], name: str, default: int | None, most: int) -> int:
    """A number of the settings; every head and every block has a tensor, so more cannot be meant."""
    count = config.get(name, default)
    if type(count) is not int or not 0 < count <= most:
        raise AdapterError(f"{folder} says {name}={count!r:.40}, and holds {most} tensors", hint=_AGAIN)
    return count


def _tensor_file(folder: Path) -> Path:
    # adapter_model is PEFT's, which may lie beside.
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_model")]
    if len(files) != 1:
        pickled = (
            " (medusa_lm_head.pt is a pickle, which can run code, and is not read)" if any(folder.glob("*.pt")) else ""
        )
        raise AdapterError(
            f"{folder} has {len(files)} safetensors files for its Medusa heads, one is needed: "
            f"{listed(file.name for file in files)}{pickled}",
            hint="keep one of them in the folder" if files else "save the heads with safetensors.torch.save_file",
        )
    return files[0]
