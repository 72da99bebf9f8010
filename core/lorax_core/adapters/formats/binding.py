"""Where every tensor of an adapter goes in a model.

Decides the site of each module that PEFT's files name: a tensor without a place is an error, and nothing is dropped silently.
What is done at a site is decided in `layer`. Knows nothing of names, of memory or of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorax_core.adapters.base import Bound, Delta
from lorax_core.adapters.deltas import LowRank, Part, Shift, joined, placed
from lorax_core.adapters.formats.head import HeadRequest, build_head
from lorax_core.adapters.formats.layer import Layer, layer_deltas, share_tie
from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles
from lorax_core.errors import AdapterError, nearest
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.site import Site
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel
from lorax_core.weights.mapping import Target, WeightMap


@dataclass(frozen=True)
class _SiteLayer(Layer):
    """A site of the model, or a part of a fused one."""

    module: str
    site: Site
    target: Target
    weight_map: WeightMap
    device: torch.device

    @property
    def kind(self) -> str:  # type: ignore[override]
        return type(self.site).__name__

    @property
    def embeds(self) -> bool:  # type: ignore[override]
        return isinstance(self.site, Embedding)

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return isinstance(self.site, Linear)

    shifts = multiplies

    @property
    def part(self) -> Part:
        if self.target.part is None:
            return None
        start = sum(self.site.parts[: self.target.part])
        return slice(start, start + self.site.parts[self.target.part])

    @property
    def shape(self) -> tuple[int, ...]:
        if self.multiplies:
            out = self.site.out_features if self.target.part is None else self.site.parts[self.target.part]
            return (out, self.site.in_features)
        if isinstance(self.site, Embedding):
            return (self.site.in_features, self.site.out_features)
        return tuple(self.site.dense_weight().shape)

    def base(self, leaf: str) -> Tensor | None:
        whole: Tensor | None = self.site.dense_weight() if leaf == "weight" else getattr(self.site, "bias", None)
        return whole if whole is None or self.part is None else whole[self.part]

    def saved(self, leaf: str, tensor: Tensor) -> Tensor:
        return self.weight_map.resolve(f"{self.module}.{leaf}").arranged(tensor)  # a matrix may be stored [in, out]

    def rows(self, tensor: Tensor) -> Tensor:
        return self.target.arranged(tensor)


def bind_files(files: PeftFiles, wanted: HeadRequest, task: Task | None, base: LoadedModel, meta: bool) -> Bound:
    """Every delta by the path of its site, and the adapter's own head; with `meta` on the meta device.

    Raises AdapterError naming the tensor that has no place in the base, or another shape.
    """
    device = torch.device("meta") if meta else base.model.device
    head, taken = build_head(files, wanted, task, base, device)
    own = {site.path: site for site in head.modules() if isinstance(site, Site)} if head is not None else {}
    layers = _layers(files, taken, {**base.model.sites, **own}, base, torch.device("meta" if meta else "cpu"))
    _share_ties(files, layers, base)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for path, changes in layers.items():
        made = _site_deltas(files, changes, device, base.model.dtype, meta)
        if made:
            deltas[path] = made
    return Bound(deltas, head)


_Changes = list[tuple[_SiteLayer, ModuleTensors]]


def _layers(
    files: PeftFiles, taken: frozenset[str], sites: Mapping[str, Site], base: LoadedModel, device: torch.device
) -> dict[str, _Changes]:
    """The modules of the files by the site that they change."""
    layers: dict[str, _Changes] = {}
    for module, tensors in files.modules.items():
        if module in taken or _is_idle(module, tensors, sites, base):
            continue
        target = base.weight_map.resolve_module(module)
        site = sites.get(target.name)
        if site is None:
            raise _no_place(files, module, sites, base)
        others = layers.setdefault(site.path, [])
        if any(other.target.part in (None, target.part) for other, _ in others):
            raise AdapterError(f"{files.path} changes {module!r} twice, under two spellings")
        others.append((_SiteLayer(module, site, target, base.weight_map, device), tensors))
    return layers


def _is_idle(module: str, tensors: ModuleTensors, sites: Mapping[str, Site], base: LoadedModel) -> bool:
    """Whether a module of the base that nothing here reads, such as BERT's pooler under embeddings, was left untrained:
    "all-linear" names it, no gradient reaches it, and its update is zero."""
    weight_map = base.weight_map
    if weight_map.resolve_module(module).name in sites or not weight_map.ignores(f"{module}.weight"):
        return False
    only_low_rank = {role for role, _ in tensors.items()} == {"a", "b"}
    if not only_low_rank or tensors.b is None or tensors.b.any():
        return False
    return weight_map.canonical(f"{module}.weight") in {weight_map.canonical(name) for name in base.checkpoint.tensors}


def _no_place(files: PeftFiles, module: str, sites: Mapping[str, Site], base: LoadedModel) -> AdapterError:
    names = [name for path in sites for name in base.weight_map.members(path)]
    close = nearest(base.weight_map.canonical(module), names)
    return AdapterError(
        f"{files.path} changes {module!r}, which {base.spec.model_type!r} does not have here; it was trained on "
        f"{files.trained_on}",
        hint=f"the nearest layer here is {close!r}" if close else "load it with the base that it was trained on",
    )


def _share_ties(files: PeftFiles, layers: dict[str, _Changes], base: LoadedModel) -> None:
    """Carry over to the other side of each tie what a change of one side means for it."""
    for name, source in base.weight_map.tie.items():
        embedding, head = source.rpartition(".")[0], name.rpartition(".")[0]
        if head not in base.model.sites or not base.is_tied(name):
            continue
        sides = [layers.get(path, []) for path in (embedding, head)]
        changes = [(side[0][0].module, side[0][1]) if side else None for side in sides]
        for path, side, tensors in zip((embedding, head), sides, share_tie(files, *changes), strict=True):
            if tensors is None:
                continue
            layer = side[0][0] if side else None
            if layer is None:
                device = next(change[0].device for other in sides for change in other)
                layer = _SiteLayer(path, base.model.sites[path], Target(path), base.weight_map, device)
            layers[path] = [(layer, tensors)]


def _site_deltas(
    files: PeftFiles, changes: _Changes, device: torch.device, dtype: torch.dtype, meta: bool
) -> tuple[Delta, ...]:
    """Everything that is done at one site: what replaces, then what is added (updates of parts in one), then biases."""
    first: list[Delta] = []
    updates: list[tuple[Part, LowRank]] = []
    shifts: list[Delta] = []
    for layer, tensors in changes:
        for delta in layer_deltas(files, tensors.meta() if meta else tensors, layer):
            if isinstance(delta, LowRank):
                updates.append((layer.part, delta))
            else:
                (shifts if isinstance(delta, Shift) else first).append(placed(delta, layer.part, device, dtype))
    out = changes[0][0].site.out_features
    return (*first, *([joined(updates, out, device, dtype)] if updates else ()), *shifts)
