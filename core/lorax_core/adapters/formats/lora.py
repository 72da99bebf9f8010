"""LoRA adapters as PEFT saves them, and where every tensor of one goes in a model.

Decides what an adapter is by its files (identity, task, ranks), and the site of each module that they name: a tensor without a
place is an error, and nothing is dropped silently. What is done at a site is decided in `layer`. Knows nothing of names, of
memory or of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorax_core.adapters.base import Adapter, Bound, Delta, fits_dtype
from lorax_core.adapters.deltas import LowRank, Part, Shift, placed, summed
from lorax_core.adapters.formats.head import HeadRequest, build_head
from lorax_core.adapters.formats.layer import Layer, layer_deltas, share_tie
from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles, read_peft
from lorax_core.adapters.formats.vocabulary import refuse_added_rows
from lorax_core.errors import AdapterError, listed, nearest
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.heads import Head
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.site import Site
from lorax_core.weights.loader import LoadedModel
from lorax_core.weights.mapping import Target, WeightMap


class LoraAdapter(Adapter):
    """What PEFT's `save_pretrained` writes for LoRA: low-rank updates, magnitudes, biases, saved modules, token rows, heads.

    Reading checks the files; `check` and `bind` hold them against a model. `head` states what the files do not: the task, the
    labels. With `shapes_only` no numbers are read, so it can only be checked.
    """

    kind = "lora"

    def __init__(self, path: str | Path, head: HeadRequest | None = None, *, shapes_only: bool = False) -> None:
        self.files = read_peft(path, shapes_only=shapes_only)
        self.head_request = head or HeadRequest()
        self.identity = "" if shapes_only else self.files.identity(self.head_request.settings)
        self.task = self.head_request.task or self.files.settings.task
        self.ranks = self.files.ranks

    def bind(self, base: LoadedModel, *, meta: bool = False) -> Bound:
        refuse_added_rows(self.files, base)
        device = torch.device("meta") if meta else base.model.device
        head, taken = build_head(self.files, self.head_request, self.task, base, device)
        own = {site.path: site for site in head.modules() if isinstance(site, Site)} if head is not None else {}
        sites = {**base.model.sites, **own}
        # On the host in float32 first: scales and norms are not rounded to 16 bit before they are used.
        made_on = torch.device("meta" if meta else "cpu")
        check_saved(self.files, head, base)
        changes, unread = _changes(self.files, taken, sites, base, made_on)
        _share_ties(self.files, changes, base, made_on)
        made: dict[str, tuple[Delta, ...]] = {}
        for path, changed in changes.items():
            with fits_dtype(f"{self.files.path} at {path!r}"):
                out = sites[path].out_features
                made[path] = _site_deltas(self.files, changed, out, device, base.model.dtype, meta)
        return Bound({path: deltas for path, deltas in made.items() if deltas}, head, unread=unread)


@dataclass(frozen=True)
class _Change:
    """What the files hold for a site of the model, or a part of it."""

    layer: Layer
    part: Part
    tensors: ModuleTensors


def _changes(
    files: PeftFiles, taken: frozenset[str], sites: Mapping[str, Site], base: LoadedModel, device: torch.device
) -> tuple[dict[str, list[_Change]], tuple[str, ...]]:
    """The modules of the files by the site that they change, and those that no loaded task reads."""
    changes: dict[str, list[_Change]] = {}
    unread: list[str] = []
    for module, tensors in files.modules.items():
        if module in taken:
            continue
        target = base.weight_map.resolve_module(module)
        site = sites.get(target.name)
        if site is None and base.holds(module):
            unread.append(module)
            continue
        if site is None:
            raise _no_place(files, module, sites, base)
        others = changes.setdefault(site.path, [])
        change = _change(module, tensors, site, target, base.weight_map, device)
        if any(other.part in (None, change.part) for other in others):
            raise AdapterError(
                f"{files.path} changes {module!r} twice, under two spellings",
                hint="keep the tensors of one spelling; PEFT's save_pretrained writes each once",
            )
        others.append(change)
    return changes, tuple(unread)


def _change(
    module: str, tensors: ModuleTensors, site: Site, target: Target, weight_map: WeightMap, device: torch.device
) -> _Change:
    part, out = None, site.out_features
    if target.part is not None:
        # Parts of a fused layer (q, k, v) lie one after the other in its output.
        start, out = sum(site.parts[: target.part]), site.parts[target.part]
        part = slice(start, start + out)
    multiplies = isinstance(site, Linear)

    def base(leaf: str) -> Tensor | None:
        whole: Tensor | None = site.dense_weight() if leaf == "weight" else getattr(site, "bias", None)
        return whole if whole is None or part is None else whole[part]

    layer = Layer(
        module,
        kind=type(site).__name__,
        shape=_shape(site, out),
        embeds=isinstance(site, Embedding),
        multiplies=multiplies,
        shifts=multiplies,
        device=device,
        base=base,
        saved=lambda leaf, tensor: weight_map.resolve(f"{module}.{leaf}").arranged(tensor),
        rows=target.arranged,
    )
    return _Change(layer, part, tensors)


def _shape(site: Site, out: int) -> tuple[int, ...]:
    if isinstance(site, Linear):
        return (out, site.in_features)
    return (site.in_features, out) if isinstance(site, Embedding) else tuple(site.dense_weight().shape)


def check_saved(files: PeftFiles, head: Head | None, base: LoadedModel) -> None:
    """Raises AdapterError where a module of `modules_to_save` lacks a tensor that the base, or the `head`, has for it.

    PEFT saves such modules whole, so the files were cut short, and the module would get the base's numbers.
    """
    weight_map = base.weight_map
    own = [name for name, _ in head.named_parameters()] if head is not None else []
    backbone = {path for path, _ in base.model.backbone.named_modules()}
    stored = [
        name
        for name in base.checkpoint.tensors
        # Without a head of its own, an adapter may have saved the base's.
        if (site := weight_map.resolve(name).name.rpartition(".")[0]) in backbone
        or (not own and site in base.model.sites)
    ]
    wanted = tuple(files.settings.modules_to_save or ())
    held = {
        weight_map.canonical(f"{module}.{leaf}")
        for module, tensors in files.modules.items()
        for leaf in ("weight", "bias")
        if getattr(tensors, leaf) is not None
    }
    # PEFT saves every module whose path ends so, and all that is in it.
    missing = [
        name
        for name in [*own, *stored]
        if any(path.endswith(wanted) for path in _parents(name)) and weight_map.canonical(name) not in held
    ]
    if wanted and missing:
        raise AdapterError(
            f"{files.path} says modules_to_save={list(wanted)!r:.60}, but does not hold {listed(missing)}",
            hint="copy or download it again, or take the name out of modules_to_save",
        )


def _parents(name: str) -> list[str]:
    """The paths of the modules that a tensor is in."""
    steps = name.split(".")[:-1]
    return [".".join(steps[: count + 1]) for count in range(len(steps))]


def _no_place(files: PeftFiles, module: str, sites: Mapping[str, Site], base: LoadedModel) -> AdapterError:
    names = [name for path in sites for name in base.weight_map.members(path)]
    close = nearest(base.weight_map.canonical(module), names)
    return AdapterError(
        f"{files.path} changes {module!r}, which {base.spec.model_type!r} does not have here; it was trained on "
        f"{files.settings.trained_on}",
        hint="load it with the base that it was trained on"
        + (f"; the nearest layer here is {close!r}" if close else ""),
    )


def _share_ties(files: PeftFiles, changes: dict[str, list[_Change]], base: LoadedModel, device: torch.device) -> None:
    """Carry over to the other side of each tie what a change of one side means for it."""
    for name, source in base.weight_map.tie.items():
        paths = (source.rpartition(".")[0], name.rpartition(".")[0])
        if paths[1] not in base.model.sites or not base.is_tied(name):
            continue
        sides = [changes[path][0] if path in changes else None for path in paths]
        modules = [side.layer.module if side is not None else path for side, path in zip(sides, paths, strict=True)]
        shared = share_tie(files, modules, *(side.tensors if side is not None else None for side in sides))
        for path, side, tensors in zip(paths, sides, shared, strict=True):
            if side is not None and tensors is not None:
                changes[path] = [replace(side, tensors=tensors)]
            elif tensors is not None:
                site = base.model.sites[path]
                changes[path] = [_change(path, tensors, site, Target(path), base.weight_map, device)]


def _site_deltas(
    files: PeftFiles, changes: list[_Change], out: int, device: torch.device, dtype: torch.dtype, meta: bool
) -> tuple[Delta, ...]:
    """Everything that is done at one site: what replaces, then what is added (updates of parts in one), then biases."""
    first: list[Delta] = []
    updates: list[LowRank] = []
    shifts: list[Delta] = []
    for change in changes:
        for delta in layer_deltas(files, change.tensors.meta() if meta else change.tensors, change.layer):
            if isinstance(delta, LowRank):
                updates.append(delta.placed(change.part, out, device, dtype))
            else:
                (shifts if isinstance(delta, Shift) else first).append(placed(delta, change.part, device, dtype))
    # A replacement writes over what is there, so it comes first; summed, the updates are one job for a kernel.
    return (*first, *([summed(updates)] if updates else ()), *shifts)
