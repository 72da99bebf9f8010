"""Any architecture beside transformers: a random model of theirs, its files, and the hidden rows that both get from them.

Decides the measure: the largest absolute difference as a share of the reference's largest number, which float32 keeps
under `TOLERANCE`. What every architecture owes is the conformance kit's to prove; this is for their quirks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from builders import change_json, change_tensors, randomise
from rigs import Bench, make_loaded
from torch import Tensor
from transformers import PreTrainedModel

from lorax_core.adapters.residency.handle import AdapterHandle
from lorax_core.plugins.host import PluginHost
from lorax_core.settings import Settings
from lorax_core.weights.loader import LoadedModel

TOLERANCE = 2e-5
TEXTS = [[5, 9, 2, 77, 13], [30], [3, 1, 1, 8, 60, 61, 62], list(range(2, 42))]


@functools.cache
def installed() -> PluginHost:
    """The installed plugins."""
    return PluginHost.discover(Settings())


def make_model(
    kind: type[PreTrainedModel], config: Mapping[str, Any], seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of transformers with its plain attention, in evaluation mode."""
    model = kind._from_config(kind.config_class(**{**config, **changes}), attn_implementation="eager").eval()
    randomise(model, seed)
    return model


def saved(model: PreTrainedModel, folder: Path, **config: Any) -> Path:
    """The model's files, with keys of its `config.json` changed (None removes one)."""
    model.save_pretrained(folder)
    if config:
        change_json(folder / "config.json", **config)
    return folder


def rename_tensors(folder: Path, rename: Any) -> Path:
    """Gives the tensors of a checkpoint other names; where `rename` answers None, the tensor goes."""
    file = folder / "model.safetensors"
    change_tensors(file, lambda found: {new: t for name, t in found.items() if (new := rename(name)) is not None})
    return folder


def add_tensors(folder: Path, **tensors: Tensor) -> Path:
    """Puts more tensors into a checkpoint."""
    change_tensors(folder / "model.safetensors", lambda found: {**found, **tensors})
    return folder


def ours(folder: Path, **options: Any) -> LoadedModel:
    """Our model of a checkpoint folder."""
    return make_loaded(folder, installed(), **options)


def our_hidden(
    base: LoadedModel, texts: Sequence[list[int]] = TEXTS, *, adapter: AdapterHandle | None = None
) -> list[Tensor]:
    """Hidden rows of each text, all texts in one batch."""
    bench = Bench(base)
    sequences = [bench.sequence(ids, adapter) for ids in texts]
    return bench.hidden(*((sequence, 0, len(sequence)) for sequence in sequences))


@torch.inference_mode()
def their_hidden(model: PreTrainedModel, texts: Sequence[list[int]] = TEXTS) -> list[Tensor]:
    """Hidden rows of each text, every one alone."""
    return [model.base_model(torch.tensor([ids])).last_hidden_state[0].float() for ids in texts]


@torch.inference_mode()
def their_logits(model: PreTrainedModel, texts: Sequence[list[int]] = TEXTS) -> list[Tensor]:
    """What the model's head says of each text."""
    return [model(torch.tensor([ids])).logits[0].float() for ids in texts]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest number that is expected."""
    a, b = torch.cat([t.flatten() for t in found]), torch.cat([t.flatten() for t in expected])
    return float((a - b).abs().max() / b.abs().max())


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    """Both are the same numbers, as far as float32 goes."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert difference(found, expected) < tolerance
