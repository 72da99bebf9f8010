"""Heads that travel with adapters.

Decides whether an adapter brings a head of its own, and builds it from the adapter's tensors, with what it lacks (a pooler)
taken from the base's checkpoint. Knows nothing of low-rank updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorax_core.adapters.peft import PeftFiles
from lorax_core.errors import AdapterError, listed
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.heads import CLASSIFICATION, Head
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.site import Site
from lorax_core.plugins.resolve import load_class
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel


@dataclass(frozen=True)
class HeadRequest:
    """What the user says of an adapter's head, where its files do not."""

    task: Task | None = None
    problem_type: str | None = None
    id2label: Mapping[int, str] | None = field(default=None, hash=False)

    @property
    def settings(self) -> tuple[object, ...]:
        """What changes the adapter's effect."""
        labels = sorted(self.id2label.items()) if self.id2label is not None else None
        return (self.task, self.problem_type, labels)


def build_head(
    files: PeftFiles, wanted: HeadRequest, task: Task | None, base: LoadedModel
) -> tuple[Head | None, frozenset[str]]:
    """The adapter's own head, None when it brings none; and the modules of the files that it is made of.

    Raises AdapterError when a head is there but not for which task, or the base lacks what it needs.
    """
    candidates = _head_tensors(files, base)
    if task is None:
        if candidates and not any(module in base.model.sites for module in candidates):
            raise AdapterError(
                f"{files.path} brings a head ({listed(candidates)}) and does not say for which task",
                hint="adapters.load(..., task='token-classification') or 'sequence-classification'",
            )
        return None, frozenset()
    if task not in CLASSIFICATION:
        return None, frozenset()
    path = base.spec.heads.get(task)
    if path is None:
        raise AdapterError(f"{files.path} is for {task.value!r}, for which {base.spec.model_type!r} has no head")
    own = {f"{module}.{leaf}": tensor for module, leafs in candidates.items() for leaf, tensor in leafs.items()}
    if not own:
        return None, frozenset()
    kind = cast("type[Head]", load_class(path, base.owner))
    tensors = _with_base(own, base)
    with torch.device("meta"):
        head = kind.build(_config(files, wanted, own, base.model.config), set(tensors), task)
    if head is None:
        raise AdapterError(
            f"{files.path} brings {listed(sorted(own))}, but a head for {task.value!r} needs more than it and the base have"
        )
    _fill(head, tensors, files, base)
    modules = {base.weight_map.canonical(module): module for module in files.pieces}
    return head, frozenset(modules[module] for module in candidates)


def _head_tensors(files: PeftFiles, base: LoadedModel) -> dict[str, dict[str, Tensor]]:
    """Saved modules that are no part of the backbone, by canonical name."""
    backbone = {path for path, _ in base.model.backbone.named_modules()}
    found: dict[str, dict[str, Tensor]] = {}
    for module, piece in files.pieces.items():
        target = base.weight_map.resolve_module(module)
        saved = {
            name: tensor for name, tensor in (("weight", piece.weight), ("bias", piece.bias)) if tensor is not None
        }
        only_saved = saved and piece.a is None and piece.embedding_a is None and piece.tokens is None
        if only_saved and target.name not in backbone and not target.name.startswith("lm_head"):
            found[target.name] = saved
    return found


def _with_base(own: Mapping[str, Tensor], base: LoadedModel) -> dict[str, Tensor]:
    """The adapter's tensors, and those of the base's checkpoint that no backbone parameter takes."""
    backbone = dict(base.model.backbone.named_parameters())
    tensors = dict(own)
    for name in base.checkpoint.tensors:
        target = base.weight_map.resolve(name)
        if target.name not in backbone and target.name not in tensors:
            tensors[target.name] = target.arranged(base.checkpoint.tensor(name))
    return tensors


def _config(files: PeftFiles, wanted: HeadRequest, own: Mapping[str, Tensor], config: ModelConfig) -> ModelConfig:
    """The base's configuration with the adapter's labels: as many as its last layer has rows."""
    count = next(reversed([tensor.shape[0] for name, tensor in own.items() if name.endswith(".weight")]))
    labels = dict(wanted.id2label) if wanted.id2label is not None else None
    if labels is None and config.id2label is not None and len(config.id2label) == count and wanted.task is None:
        labels = None  # equal counts do not make equal labels: the base's are not the adapter's
    if labels is not None and sorted(labels) != list(range(count)):
        raise AdapterError(f"{files.path} has {count} labels; id2label names {sorted(labels)}")
    changes: dict[str, object] = {
        "id2label": labels or {index: f"LABEL_{index}" for index in range(count)},
        "problem_type": wanted.problem_type,
    }
    return type(config).model_validate({**config.model_dump(), **changes})


def _fill(head: Head, tensors: Mapping[str, Tensor], files: PeftFiles, base: LoadedModel) -> None:
    model = base.model
    for path, module in head.named_modules():
        if isinstance(module, Site):
            module.path = path
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            tensor = tensors.get(full)
            if tensor is None:
                raise AdapterError(f"{files.path} and its base lack {full!r}, which the head needs")
            if tensor.shape != parameter.shape:
                raise AdapterError(
                    f"{files.path}: {full!r} has shape {list(tensor.shape)}, the head asks for {list(parameter.shape)}"
                )
            setattr(module, name, nn.Parameter(tensor.to(model.device, model.dtype), requires_grad=False))
    for module in head.modules():
        if isinstance(module, Linear):
            module.pack()
    head.eval()
