"""From a checkpoint and an architecture's declaration to a filled model.

Decides the order of loading and accounts for every tensor: one that no parameter takes, or a parameter that no tensor
fills, is an error that names it. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lorax_core.errors import CheckpointError, listed, nearest
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.heads import Head
from lorax_core.modeling.linear import prepare_linears
from lorax_core.modeling.model import Model
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.mapping import Target, WeightMap


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


@dataclass
class Account:
    """Which tensors went where. `problems` are sentences; a checkpoint without any is whole."""

    filled: int = 0
    ignored: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        problems = list(self.misfits)
        if self.missing:
            problems.append(f"missing from the checkpoint: {listed(self.missing)}")
        if self.unused:
            # A tensor without a place beside a place without a tensor is most often one misspelt rename of a plugin.
            close = nearest(self.unused[0], self.missing)
            hint = f"; {self.unused[0]!r} may be meant as {close!r}" if close else ""
            problems.append(f"no parameter takes: {listed(self.unused)}{hint}")
        return problems


def load_model(
    checkpoint: Checkpoint,
    host: PluginHost,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    model_class: type[Model] = Model,
    linear_policy: LinearPolicy | None = None,
) -> LoadedModel:
    """Build the architecture that `config.json` names and fill it. `dtype` None keeps the checkpoint's own.

    `linear_policy` names linear methods for layers; by default each takes the first that supports it.
    A `model_class` that fixes a task gets the head of that task alone.
    Raises PluginError when nothing serves the `model_type`, CheckpointError when a tensor is missing, unused or misshapen.
    """
    built, account = assemble(checkpoint, host, dtype, device, model_class)
    if account.problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {built.spec.model_type!r}: " + "; ".join(account.problems),
            hint="`lorax models check PATH` tells what the checkpoint holds",
        )
    # Last, as preparing may copy the numbers into another layout and drops the parameters.
    built.model.linears = prepare_linears(built.model, linear_policy)
    return built


def assemble(
    checkpoint: Checkpoint,
    host: PluginHost,
    dtype: torch.dtype | None,
    device: str,
    model_class: type[Model] = Model,
) -> tuple[LoadedModel, Account]:
    """A model filled as far as the checkpoint goes, with the account of what was not."""
    model_type = checkpoint.config["model_type"]
    spec = host.architecture(model_type)
    owner = host.owner(model_type)
    config = cast("type[ModelConfig]", load_class(spec.config, owner)).parse(checkpoint.config)
    backbone_class = cast("Backbone", load_class(spec.backbone, owner))
    weight_map = backbone_class.weight_map(config)
    # Heads are found by their tensors: config.json may name no class, or one whose head is not all that the file holds.
    names = {weight_map.resolve(name).name for name in checkpoint.tensors}
    stated = stated_task(spec, config)
    found: dict[Task, Head] = {}
    # Shapes only: which heads exist, and what is tied, is known before any memory is taken.
    with torch.device("meta"):
        backbone = _backbone(backbone_class, config, checkpoint)
        for task in spec.tasks:
            head = cast("type[Head]", load_class(spec.head(task), owner)).build(config, names, stated)
            if head is not None:
                found[task] = head
    # `found` keeps the others, since their tensors in the file are spare and not unused.
    heads = {task: head for task, head in found.items() if model_class.task in (None, task)}
    if not heads:
        wanted = listed(task.value for task in spec.tasks if model_class.task in (None, task))
        has = listed(task.value for task in found)
        raise CheckpointError(f"{checkpoint.path} has no head of {model_type!r} for {wanted}; those that it has: {has}")
    dtype = dtype or stored_dtype(checkpoint)
    model = model_class(config, backbone, heads, dtype=dtype, device=device)
    _materialise(model)
    spare = {name for head in found.values() for name, _ in head.named_parameters()}  # of heads that were not asked for
    account = _fill(model, checkpoint, weight_map, spare)
    # What the file states before what the plugin prefers, each only if its head is there.
    preferred = [task for task in (stated, Task(spec.default_task)) if task in heads]
    default_task = preferred[0] if preferred and preferred[0] is not None else next(iter(heads))
    return LoadedModel(model, spec, weight_map, checkpoint, default_task, owner), account


def _backbone(backbone_class: Backbone, config: ModelConfig, checkpoint: Checkpoint) -> nn.Module:
    try:
        return backbone_class(config)
    except ValueError as error:  # blocks check their sizes when they are made
        raise CheckpointError(
            f"{checkpoint.path} has a config.json that no model can be built from: {error}",
            hint="compare it with the config.json that transformers writes for this architecture",
        ) from error


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


def _materialise(model: Model) -> None:
    """Give parameters real memory, and recompute buffers, which a module makes from its own arguments.

    Parameters of one name are one: where `config.json` states no task, two heads may read the same tensors.
    """
    made: dict[str, nn.Parameter] = {}
    for path, module in model.named_parts():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # No prefix keeps heads apart in `named_parts`, so a name that two of them have leads to one parameter.
            full = f"{path}.{name}"
            if full not in made:
                empty = torch.empty(parameter.shape, dtype=model.dtype, device=model.device)
                made[full] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[full])
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # The default would be a buffer left on `meta`, which fails at the first step only, with torch's own message.
            reset = getattr(module, "reset_buffers", None)
            if reset is None:
                raise TypeError(f"{type(module).__name__} has buffers but no reset_buffers(device) to make them")
            reset(model.device)


def _fill(model: Model, checkpoint: Checkpoint, weight_map: WeightMap, spare: Set[str]) -> Account:
    """Every tensor of the checkpoint to its place. Those of `spare` may lack one."""
    account = Account()
    parameters = model.named_tensors()
    wanted = _wanted(model, parameters, weight_map)
    filled: dict[tuple[str, int | None], str] = {}
    scales = _scale_places(model)
    for name, tensor in checkpoint.read():
        if (place := scales.get(weight_map.canonical(name))) is not None:
            layer, attribute = place
            setattr(layer, attribute, float(tensor))
            account.filled += 1
            continue
        target = weight_map.resolve(name)
        key = (target.name, target.part)
        if key not in wanted:
            # Ignored ones are reported by `models check`; unused ones stop loading, as a plugin has forgotten them.
            known = target.name in spare or weight_map.ignores(name) or _is_spare_tie(target, weight_map, parameters)
            (account.ignored if known else account.unused).append(name)
            continue
        if key in filled:
            account.misfits.append(f"{name!r} and {filled[key]!r} are the same parameter {target.name!r}")
            continue
        misfit = _copy(tensor, parameters[target.name], target, model)
        if misfit:
            account.misfits.append(f"{name!r} {misfit}")
        # After a misfit too, or the same tensor would be reported as missing as well.
        filled[key] = name
    # After all files were read: a head stored in the last one wins over the tie.
    _tie(model, weight_map, parameters, filled)
    account.filled += len(filled)
    account.missing = [_spelt(weight_map, *key) for key in wanted if key not in filled]
    return account


def _wanted(
    model: Model, parameters: dict[str, nn.Parameter], weight_map: WeightMap
) -> dict[tuple[str, int | None], None]:
    """Every piece that a checkpoint must fill, in order: a parameter, or each part of one that is fused from several."""
    wanted: dict[tuple[str, int | None], None] = {}
    for name in parameters:
        module = name.rpartition(".")[0]
        # Members of the map, not parts of the layer: GPT-2 and NeoX store q, k, v as one tensor.
        parts = len(weight_map.members(module)) if module in model.sites else 1
        wanted |= dict.fromkeys([(name, part) for part in range(parts)] if parts > 1 else [(name, None)])
    return wanted


def _scale_places(model: Model) -> dict[str, tuple[Attention, str]]:
    """Where the scales of an 8-bit cache go, by the names that checkpoints with such scales use."""
    places: dict[str, tuple[Attention, str]] = {}
    for path, module in model.backbone.named_modules():
        if isinstance(module, Attention):
            parent = path.rpartition(".")[0]
            for scale in ("k_scale", "v_scale"):
                # Files agree on no place: the attention module, `attn` below it, or k_proj and v_proj.
                for name in (f"{parent}.{scale}", f"{parent}.attn.{scale}", f"{parent}.{scale[0]}_proj.{scale}"):
                    places[name] = (module, scale)
    return places


def _copy(tensor: Tensor, parameter: nn.Parameter, target: Target, model: Model) -> str | None:
    """Write a tensor into its place; says what is wrong with its shape or numbers otherwise."""
    tensor = target.arranged(tensor)
    place: Tensor = parameter.detach()
    if target.part is not None:
        site = model.sites[target.name.rpartition(".")[0]]
        # Rows of this member in the fused [sum(parts), in].
        start = sum(site.parts[: target.part])
        place = place[start : start + site.parts[target.part]]
    if tensor.shape != place.shape:
        return f"has shape {list(tensor.shape)} where the configuration asks for {list(place.shape)}"
    if not tensor.is_floating_point() or tensor.itemsize == 1:  # 8 bit would need its scales
        return f"holds {tensor.dtype} where 16, 32 or 64 bit floating point is needed"
    # A single NaN would make every answer NaN without any error, so a damaged file is refused here.
    if not torch.isfinite(tensor).all():
        return "holds NaN or infinite numbers"
    place.copy_(tensor)
    return None


def _tie(
    model: Model,
    weight_map: WeightMap,
    parameters: dict[str, nn.Parameter],
    filled: dict[tuple[str, int | None], str],
) -> None:
    """Parameters that the checkpoint leaves to a tie become the same object, so that one prepared weight serves both."""
    for name, source in weight_map.tie.items():
        if name in parameters and (name, None) not in filled and (source, None) in filled:
            path, _, leaf = name.rpartition(".")
            # A loop, because two modules may have one path: heads built side by side share the name.
            for found, module in model.named_parts():
                if found == path:
                    setattr(module, leaf, parameters[source])
            filled[(name, None)] = filled[(source, None)]


def _is_spare_tie(target: Target, weight_map: WeightMap, parameters: dict[str, nn.Parameter]) -> bool:
    """A tied weight that the file stores as well, for a head that this model does not have."""
    return target.name in weight_map.tie and target.name not in parameters


def _spelt(weight_map: WeightMap, name: str, part: int | None) -> str:
    """A missing tensor under the name that checkpoints give it."""
    module, _, leaf = name.rpartition(".")
    stored = name if part is None else f"{weight_map.members(module)[part]}.{leaf}"
    return weight_map.stored_name(stored)


def stated_task(spec: ArchitectureSpec, config: ModelConfig) -> Task | None:
    """The task of the class that the configuration names, None when it names none that is known."""
    known = (spec.hf_architectures[name] for name in config.architectures or () if name in spec.hf_architectures)
    return next((Task(task) for task in known), None)
