"""Adapters for tiny checkpoints: made, written as PEFT writes them or by PEFT, and merged by our own arithmetic.

Decides which layers there are to change and to replace, and what a merged one is. Knows nothing of how lorax-core applies an
adapter.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """How an adapter is made. `every` takes each n-th layer only; `zero` leaves B at 0, as training starts."""

    rank: int
    alpha: float
    rslora: bool = False
    every: int = 1
    zero: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def linear_layers(oracle: nn.Module, ignored: Collection[str]) -> dict[str, nn.Module]:
    """The oracle's linear layers by name, without those whose weight inference is known not to need."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in oracle.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{name}.weight" not in ignored
    }


def write_adapter(layers: Mapping[str, nn.Module], options: LoraOptions, folder: Path, seed: int) -> Path:
    """An adapter of these layers in PEFT's files."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    chosen = list(layers)[:: options.every]
    for name in chosen:
        rows, columns = _shape(layers[name])
        # A of this size keeps x A^T about as large as x; B is large enough that the update is seen.
        a = torch.randn(options.rank, columns, generator=generator) * columns**-0.5  # [rank, in]
        b = torch.randn(rows, options.rank, generator=generator) * 0.1  # [out, rank]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.zeros_like(b) if options.zero else b
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "tiny",
        "r": options.rank,
        "lora_alpha": options.alpha,
        "use_rslora": options.rslora,
        "target_modules": chosen,
        "fan_in_fan_out": any(not isinstance(layers[name], nn.Linear) for name in chosen),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def replaceable(oracle: nn.Module, ignored: Collection[str]) -> list[str]:
    """The names of modules whose numbers adapters replace as a whole, as far as inference needs them: norms, tables, heads."""
    inside = {id(module) for module in cast("nn.Module", oracle.base_model).modules()}
    layers = linear_layers(oracle, ignored)
    found = []
    for name, module in oracle.named_modules():
        weight = module._parameters.get("weight")
        head = name in layers and id(module) not in inside
        if weight is not None and (head or isinstance(module, nn.Embedding) or weight.ndim == 1):
            found.append(name)
    return found


def trained_with_peft(oracle: nn.Module, settings: Mapping[str, Any], folder: Path, seed: int) -> nn.Module:
    """A copy of the oracle under an adapter of PEFT's making, every number of it random; its files are written to `folder`."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        # PEFT draws what A begins with: a failure must come back with the same numbers.
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(oracle), LoraConfig(r=2, lora_alpha=4, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            # What is trained: copies of the base's numbers, and updates that begin at zero.
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return cast("nn.Module", adapted.eval().base_model.model)


def merged(oracle: nn.Module, adapter: Path, options: LoraOptions) -> nn.Module:
    """A copy of the oracle with `scale B A` added to its weights; one shared with an embedding becomes its own."""
    changed = copy.deepcopy(oracle)
    modules = dict(changed.named_modules())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        layer = modules[name]
        assert isinstance(layer.weight, Tensor)
        # In float64: this is the reference, whose own rounding must not count.
        delta = options.scale * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())  # [out, in]
        if not isinstance(layer, nn.Linear):
            # Conv1D of GPT-2 stores [in, out].
            delta = delta.t()
        # A tied head gets a weight of its own below, and the config must not tie it again.
        if any(other is not layer and getattr(other, "weight", None) is layer.weight for other in modules.values()):
            changed.config.tie_word_embeddings = False  # type: ignore[union-attr]
        layer.weight = nn.Parameter((layer.weight.double() + delta).float(), requires_grad=False)
    return changed


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns `[out, in]` of a layer, which GPT-2's kind stores the other way round."""
    assert isinstance(layer.weight, Tensor)
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)
