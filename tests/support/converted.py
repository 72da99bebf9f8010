"""Adapters that began inside the base's weights (PiSSA, OLoRA, CorDA, LoRA-GA), and their files for the base as it was.

Such a start takes out of the base what it puts into the adapter, so that the trained adapter fits only the changed base.
PEFT converts it, given the start, to a plain LoRA of twice the rank. LoftQ is not here: PEFT needs bitsandbytes and an
accelerator to make one, and does not convert it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

# What the starts need that look at data, beside a function that runs the model on it.
_NEEDS: dict[str, tuple[dict[str, Any], Callable[..., None]]] = {
    "corda": ({"corda_config": CordaConfig(corda_method="kpm")}, preprocess_corda),
    "lora_ga": ({"lora_ga_config": LoraGAConfig()}, preprocess_loraga),
}


def trained_within(model: Any, folder: Path, seed: int, texts: Sequence[list[int]], **options: Any) -> PeftModel:
    """PEFT on `model`, whose weights change, with every low-rank matrix moved from its start as training would."""
    more, prepare = _NEEDS.get(options["init_lora_weights"], ({}, None))
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **options, **more})
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out by itself
        if prepare is not None:
            prepare(model, config, lambda: _run(model, texts))
        lora = get_peft_model(model, config).eval()
        lora.save_pretrained(str(folder / "start"), save_embedding_layers=False)
    with torch.no_grad():
        for name, tensor in lora.named_parameters():
            if "lora_" in name:
                tensor.add_(0.5 * torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)
    return lora


def save_converted(lora: PeftModel, folder: Path) -> Path:
    """The adapter's folder, as PEFT converts it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.save_pretrained(
            str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=str(folder / "start")
        )
    return folder


def _run(model: Any, texts: Sequence[list[int]]) -> None:
    """Forward, and backward where gradients are wanted."""
    for ids in texts:
        out = model(input_ids=torch.tensor([ids]))
        numbers = out.logits if "logits" in out else out.last_hidden_state
        if numbers.requires_grad:
            numbers.pow(2).mean().backward()
