"""Which of core's heads gives the answers of a class of transformers, and which tensors are of heads that core does not have.

Decides it for decoders by the tensors outside of the base model; for encoders by the numbers of an observed pass, too. Knows
nothing of what a base model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.fields import Field
from lorax_core.scaffold.formulas import activation, weight_of
from lorax_core.scaffold.layers import match
from lorax_core.scaffold.record import Record, observe, same
from lorax_core.scaffold.tiny import Tiny
from lorax_core.types import Task

_LEAVES: Final = {
    Task.GENERATE: ({"weight"}, {"weight", "bias"}),
    Task.TOKEN_CLASSIFICATION: ({"weight", "bias"},),
    Task.SEQUENCE_CLASSIFICATION: ({"weight"},),
}


@dataclass(frozen=True)
class PooledHead:
    """What labels a text by its first row: `output(act(dense(row)))`, two linear layers by their names in checkpoints."""

    dense: str
    output: str
    act: str


@dataclass(frozen=True)
class HeadFacts:
    """The layer of each task's head, that of texts where it is a `PooledHead`, and modules of heads that core does not have.

    `mistaken` are classes with a head that core does not have, and the tensors of one that it has: multiple choice, say.
    """

    layers: Mapping[Task, str]
    pooled: PooledHead | None
    ignored: tuple[str, ...]
    mistaken: tuple[Any, ...]


def find_heads(tiny: Tiny, beside: Collection[str], acts: Mapping[str, Any]) -> HeadFacts:
    """The heads of all classes. `beside` are modules of a base model that its rows do not depend on.

    `acts` are values of fields under which feed-forward blocks have another activation: a head's must not change with it.
    """
    found: dict[Task, str] = {}
    pooled: PooledHead | None = None
    ignored: dict[str, None] = dict.fromkeys(name.partition(".")[0] for name in beside)
    encodes = Task.GENERATE not in tiny.source.classes
    for kind in (*tiny.source.classes.values(), *tiny.source.others):
        task = next((task for task, one in tiny.source.classes.items() if one is kind), None)
        try:
            model = tiny.model(kind=kind)
        except Exception as error:
            raise NotUnderstood([f"{kind.__name__} cannot be made: {error}"]) from error
        outside = _outside(model)
        layers = {name.rpartition(".")[0] for name in outside}
        leaves = {name.rpartition(".")[2] for name in outside}
        if task is Task.SEQUENCE_CLASSIFICATION and encodes:
            pooled = _pooled(tiny, kind, acts)
            found |= {} if pooled is None else {task: pooled.output}
        elif task in _LEAVES and len(layers) == 1 and leaves in _LEAVES[task]:
            found |= dict.fromkeys([task], layers.pop()) if not encodes or _labels_rows(tiny, model) else {}
        if task is not Task.EMBED and task not in found:
            ignored |= dict.fromkeys(sorted(name.partition(".")[0] for name in layers))
    if not encodes and found.get(Task.SEQUENCE_CLASSIFICATION, "score") != "score":
        ignored[found.pop(Task.SEQUENCE_CLASSIFICATION)] = None
    # A pooler is ignored where no head takes it.
    taken = [*found.values(), *([pooled.dense] if pooled is not None and pooled.dense not in beside else [])]
    known = {name.partition(".")[0] for name in taken}
    mistaken = tuple(kind for kind in tiny.source.others if _has_one_of(found, pooled, tiny.model(kind=kind)))
    return HeadFacts(found, pooled, tuple(f"{name}.**" for name in ignored if name not in known), mistaken)


def refuse_in_heads(tiny: Tiny, fields: Mapping[str, Field], tasks: Collection[Task]) -> None:
    """Refuse fields without effect on hidden rows that change what a head makes of them, in place."""
    silent = {name: one.harmless[0] for name, one in fields.items() if one.inert and one.harmless}
    for task in tasks:
        kind = tiny.source.classes[task]
        usual = _seen(tiny, kind, {})
        if _is_same(usual, _seen(tiny, kind, silent)):
            continue
        for name, value in silent.items():
            if not _is_same(usual, _seen(tiny, kind, {name: value})):
                fields[name].inert, fields[name].harmless = False, []
                fields[name].why = f"{value!r}: {kind.__name__} gives other answers"


def _outside(model: nn.Module) -> list[str]:
    """The tensors of a model that are not of its base model."""
    inside = {id(one) for one in cast("nn.Module", model.base_model).parameters()}
    return [
        name for name, one in model.named_parameters(remove_duplicate=False) if id(one) not in inside or "head" in name
    ]


def _has_one_of(layers: Mapping[Task, str], pooled: PooledHead | None, model: nn.Module) -> bool:
    """Whether a model has the layers of a head that classifies."""
    prefix = f"{model.base_model_prefix}."
    modules = {name.removeprefix(prefix).rpartition(".")[0] for name, _ in model.named_parameters()}
    heads = [{layer} for task, layer in layers.items() if task is not Task.GENERATE]
    heads += [{pooled.dense, pooled.output}] if pooled is not None else []
    return any(head <= modules for head in heads)


def _labels_rows(tiny: Tiny, model: nn.Module) -> bool:
    """Whether a linear layer makes the labels of each row of the row alone."""
    record = observe(model, tiny.ids(tiny.config()))
    linears = [call for call in record.calls if weight_of(call.module) is not None]
    return record.logits is not None and match(linears, x=record.hidden, y=record.logits) is not None


def _pooled(tiny: Tiny, kind: Any, acts: Mapping[str, Any]) -> PooledHead | None:
    """The head of a class that labels texts, where it is one, and the same whatever other blocks have for an activation."""
    config = tiny.config()
    found = _pooled_of(observe(tiny.model(config, kind), tiny.ids(config)))
    other = tiny.config(**acts)
    return found if found == _pooled_of(observe(tiny.model(other, kind), tiny.ids(other))) else None


def _pooled_of(record: Record) -> PooledHead | None:
    if record.logits is None:
        return None
    prefix = str(record.model.base_model_prefix)
    linears = [call for call in record.calls if weight_of(call.module) is not None]
    dense, output = match(linears, x=record.hidden[:1]), match(linears, y=record.logits[None])
    if dense is None or output is None or dense is output or dense.y.shape != output.x.shape:
        return None
    if not all(isinstance(getattr(call.module, "bias", None), Tensor) for call in (dense, output)):
        return None
    act = activation(dense.y, output.x)
    first, last = (call.name.removeprefix(f"{prefix}.") for call in (dense, output))
    return None if act is None else PooledHead(first, last, act)


def _seen(tiny: Tiny, kind: Any, changes: Mapping[str, Any]) -> tuple[Tensor, list[str]] | None:
    """The answers of a class under some changes, and the names of its tensors; None where transformers refuses them."""
    try:
        config = tiny.config(**changes)
        record = observe(tiny.model(config, kind), tiny.ids(config))
    except Exception:  # whatever transformers raises: it takes no such configuration
        return None
    logits = torch.empty(0) if record.logits is None else record.logits
    return logits, [name for name, _ in record.model.named_parameters()]


def _is_same(one: tuple[Tensor, list[str]] | None, other: tuple[Tensor, list[str]] | None) -> bool:
    return one is not None and other is not None and one[1] == other[1] and same(one[0], other[0], 1e-6)
