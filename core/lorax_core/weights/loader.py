"""From a checkpoint and an architecture's declaration to a filled model.

Decides the order of loading and accounts for every tensor: one that no parameter takes, or a parameter that no tensor
fills, is an error that names it. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from lorax_core.errors import CheckpointError, listed
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.heads import Head
from lorax_core.modeling.model import LACKING_HINT, Model
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.progress import Report, silent
from lorax_core.types import Task
from lorax_core.untrusted import guarded
from lorax_core.weights.account import Account, place_tensors
from lorax_core.weights.bounds import (
    as_config_error,
    refuse_other_masks,
    within_bounds,
)
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.fill import fill
from lorax_core.weights.mapping import WeightMap
from lorax_core.weights.sentence import read_score_tokens


class Backbone(Protocol):
    """What a plugin's backbone class offers beside `forward(batch) -> hidden [tokens, hidden]`."""

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap: ...

    def __call__(self, config: ModelConfig) -> nn.Module: ...


@dataclass
class LoadedModel:
    """A model with what its adapters and its front need of the checkpoint."""

    model: Model
    spec: ArchitectureSpec
    weight_map: WeightMap
    checkpoint: Checkpoint
    default_task: Task
    owner: PluginRecord
    load_seconds: float = 0.0  # to read, check and prepare all weights

    def is_tied(self, name: str) -> bool:
        """Whether a parameter of the map's ties has no numbers of its own in the checkpoint."""
        # By name and not by identity of parameters: after preparation `weight` is None in both layers.
        stored = {self.weight_map.resolve(tensor).name for tensor in self.checkpoint.tensors}
        return name in self.weight_map.tie and name not in stored

    def holds(self, module: str) -> bool:
        """Whether the checkpoint has numbers for a module, of its own or by a tie, whatever reads them here."""
        name = self.weight_map.resolve_module(module).name
        stored = {self.weight_map.resolve(tensor).name.rpartition(".")[0] for tensor in self.checkpoint.tensors}
        return name in stored or f"{name}.weight" in self.weight_map.tie


def load_model(
    checkpoint: Checkpoint,
    host: PluginHost,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    model_class: type[Model] = Model,
    linear_policy: LinearPolicy | None = None,
    report: Report = silent,
) -> LoadedModel:
    """Build the architecture that `config.json` names and fill it. `dtype` None keeps the checkpoint's own.

    `linear_policy` names linear methods for layers; by default each takes the first that supports it.
    A `model_class` that fixes a task gets the head of that task alone.
    Raises PluginError when nothing serves the `model_type`, CheckpointError when a tensor is missing, unused or misshapen.
    """
    started = time.perf_counter()
    built, account = assemble(checkpoint, host, dtype, device, model_class, linear_policy or LinearPolicy(), report)
    if account.problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {built.spec.model_type!r}: {account.summary}",
            hint="`lorax models check PATH` tells what the checkpoint holds",
        )
    if built.model.device.type == "cuda":
        torch.cuda.synchronize(built.model.device)  # copies to it may still be on their way
    built.load_seconds = time.perf_counter() - started
    return built


def assemble(
    checkpoint: Checkpoint,
    host: PluginHost,
    dtype: torch.dtype | None,
    device: str,
    model_class: type[Model] = Model,
    linear_policy: LinearPolicy | None = None,
    report: Report = silent,
) -> tuple[LoadedModel, Account]:
    """A filled model, with the account of its checkpoint; with problems in the account, it is not to be computed with.

    With a policy its linear layers are prepared, too, each as soon as its numbers are read.
    """
    model_type = checkpoint.config["model_type"]
    spec, owner = host.architecture(model_type), host.owner(model_type)
    with _loading(checkpoint, owner):
        built, spare = _built(checkpoint, spec, owner, dtype, device, model_class)
        placement = place_tensors(built.model, checkpoint.tensors, built.weight_map, spare)
        fill(built.model, checkpoint, placement, linear_policy, report)
    return built, placement.account


def unfilled(checkpoint: Checkpoint, host: PluginHost) -> LoadedModel:
    """The model of a checkpoint with every head, without numbers: its layers are on the meta device."""
    model_type = checkpoint.config["model_type"]
    spec, owner = host.architecture(model_type), host.owner(model_type)
    with _loading(checkpoint, owner):
        return _built(checkpoint, spec, owner, torch.float32, "meta", Model)[0]


def _loading(checkpoint: Checkpoint, owner: PluginRecord) -> AbstractContextManager[None]:
    # The last net: what the checks before have not foreseen names the checkpoint, and the package that could not load it.
    package = owner.package
    return guarded(
        CheckpointError,
        f"'{checkpoint.path}' cannot be loaded by {package}",
        f"compare its config.json with the one that transformers writes; if it is sound, this is a defect of {package}",
    )


def _built(
    checkpoint: Checkpoint,
    spec: ArchitectureSpec,
    owner: PluginRecord,
    dtype: torch.dtype | None,
    device: str,
    model_class: type[Model],
) -> tuple[LoadedModel, set[str]]:
    """A model whose layers are still on `meta`, and the parameters of heads that were not asked for."""
    tokens = read_score_tokens(checkpoint)
    raw = checkpoint.config if tokens is None else {**checkpoint.config, "score_tokens": tokens}
    config = cast("type[ModelConfig]", load_class(spec.config, owner)).parse(raw)
    backbone_class = cast("Backbone", load_class(spec.backbone, owner))
    with as_config_error(checkpoint):
        weight_map = backbone_class.weight_map(config)
    # Heads are found by their tensors: config.json may name no class, or one whose head is not all that the file holds.
    names = {weight_map.resolve(name).name for name in checkpoint.tensors}
    stated = stated_task(spec, config)
    # Shapes only: which heads exist, what is tied and what fits is known before any memory is taken.
    with within_bounds(checkpoint):
        backbone = backbone_class(config)
        head_classes = {task: cast("type[Head]", load_class(spec.head(task), owner)) for task in spec.tasks}
        made = {task: head_class.build(config, names, stated) for task, head_class in head_classes.items()}
    found = {task: head for task, head in made.items() if head is not None}
    # `found` keeps the others, since their tensors in the file are spare and not unused.
    heads = {task: head for task, head in found.items() if model_class.task in (None, task)}
    lacking: dict[Task, str] = {}
    if stated is not None and stated not in found:
        lacking = _lacking(checkpoint, head_classes, config, stated, weight_map)
    if not heads:
        for sentence in lacking.values() if model_class.task in (None, stated) else ():
            raise CheckpointError(sentence, hint=LACKING_HINT)
        wanted = listed(task.value for task in spec.tasks if model_class.task in (None, task))
        has = listed(task.value for task in found)
        raise CheckpointError(
            f"{checkpoint.path} has no head of {spec.model_type!r} for {wanted}; those that it has: {has}",
            hint="`lorax models check PATH` tells what the checkpoint holds",
        )
    dtype = dtype or stored_dtype(checkpoint)
    model = model_class(config, backbone, heads, dtype=dtype, device=device)
    model.lacking = lacking
    refuse_other_masks(checkpoint, model)
    spare = {name for head in found.values() for name, _ in head.named_parameters()}  # of heads that were not asked for
    # What the file states before what the plugin prefers, each only if its head is there.
    preferred = [task for task in (stated, Task(spec.default_task)) if task in heads]
    default_task = preferred[0] if preferred and preferred[0] is not None else next(iter(heads))
    return LoadedModel(model, spec, weight_map, checkpoint, default_task, owner), spare


class _Everything(Set[str]):
    """The names of a checkpoint that lacks nothing."""

    def __contains__(self, name: object) -> bool:
        return True

    def __ge__(self, other: Set[Any]) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _lacking(
    checkpoint: Checkpoint,
    head_classes: Mapping[Task, type[Head]],
    config: ModelConfig,
    stated: Task,
    weight_map: WeightMap,
) -> dict[Task, str]:
    """What is missing for the task of the class that `config.json` names; nothing where the configuration rules it out."""
    with within_bounds(checkpoint):
        head = head_classes[stated].build(config, _Everything(), stated)
    stored = {weight_map.resolve(name).name for name in checkpoint.tensors}
    missing = [name for name, _ in head.named_parameters() if name not in stored] if head is not None else []
    if not missing:
        return {}
    named = (config.architectures or ("",))[0]
    tensors = listed(weight_map.stored_name(name) for name in missing)
    return {stated: f"{checkpoint.path} says that it is a {named}, but lacks {tensors}, the head for {stated.value!r}"}


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the configuration states, else float32."""
    # "dtype" is the key of transformers 5, "torch_dtype" that of before.
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(stated), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{checkpoint.path} states dtype {stated!r}; supported are 'float32', 'bfloat16', 'float16'",
            hint="name one with load(..., dtype=...)",
        )
    return cast("torch.dtype", dtype)


def stated_task(spec: ArchitectureSpec, config: ModelConfig) -> Task | None:
    """The task of the class that the configuration names, None when it names none that is known."""
    known = (spec.hf_architectures[name] for name in config.architectures or () if name in spec.hf_architectures)
    return next((Task(task) for task in known), None)
