"""Where every tensor of an adapter goes.

Decides the site of each module that PEFT's files name, and what is done there: a tensor without a place, or of another shape,
is an error, and nothing is dropped silently. Knows nothing of names, of memory or of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorax_core.adapters.base import Delta
from lorax_core.adapters.deltas import (
    Block,
    Dora,
    EmbeddingLowRank,
    LowRank,
    Part,
    Replacement,
    Shift,
    TokenLogits,
    TokenRows,
)
from lorax_core.adapters.formats.head import HeadRequest, build_head
from lorax_core.adapters.formats.peft import PeftFiles, Piece
from lorax_core.errors import AdapterError, nearest
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.heads import Head
from lorax_core.modeling.linear import Linear
from lorax_core.modeling.site import Site
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel
from lorax_core.weights.mapping import Target


@dataclass(frozen=True, slots=True)
class _Place:
    """A site of the model, or a part of a fused one, that a module of the files stands for."""

    module: str
    site: Site
    target: Target

    @property
    def part(self) -> Part:
        if self.target.part is None:
            return None
        start = sum(self.site.parts[: self.target.part])
        return slice(start, start + self.site.parts[self.target.part])

    @property
    def rows(self) -> int:
        return self.site.out_features if self.target.part is None else self.site.parts[self.target.part]

    def base(self, name: str) -> Tensor | None:
        """The base's own weight or bias here."""
        whole = self.site.dense_weight() if name == "weight" else getattr(self.site, "bias", None)
        return whole if whole is None or self.part is None else whole[self.part]


class Binding:
    """The files of one adapter on their way to the sites of one model."""

    def __init__(self, files: PeftFiles, wanted: HeadRequest, task: Task | None, base: LoadedModel) -> None:
        self.files = files
        self.path = files.path
        self._wanted = wanted
        self._task = task
        self._base = base

    def made(self) -> tuple[dict[str, list[Delta]], Head | None]:
        """Every delta by the path of its site, and the head that the adapter brings."""
        head, taken = build_head(self.files, self._wanted, self._task, self._base)
        own = {site.path: site for site in head.modules() if isinstance(site, Site)} if head is not None else {}
        sites = {**self._base.model.sites, **own}
        places: dict[str, list[tuple[_Place, Piece]]] = {}
        for module, piece in self.files.pieces.items():
            if module in taken or self._is_idle(module, piece, sites):
                continue
            place = self._place(module, sites)
            others = places.setdefault(place.site.path, [])
            if any(other.target.part in (None, place.target.part) for other, _ in others):
                raise AdapterError(f"{self.path} changes {module!r} twice, under two spellings")
            others.append((place, piece))
        deltas: dict[str, list[Delta]] = {}
        for path, pieces in places.items():
            made = self._site_deltas(pieces)
            if made:
                deltas[path] = made
        self._tie_bases(deltas, places)
        self._tie_tokens(deltas)
        return deltas, head

    def _is_idle(self, module: str, piece: Piece, sites: Mapping[str, Site]) -> bool:
        """Whether a module of the base that nothing here reads, such as BERT's pooler under embeddings, was left untrained:
        "all-linear" names it, no gradient reaches it, and its update is zero."""
        weight_map = self._base.weight_map
        if weight_map.resolve_module(module).name in sites or not weight_map.ignores(f"{module}.weight"):
            return False
        stored = {weight_map.canonical(name) for name in self._base.checkpoint.tensors}
        only_low_rank = {role for role, _ in piece.items()} == {"a", "b"}
        return (
            only_low_rank
            and piece.b is not None
            and not piece.b.any()
            and (weight_map.canonical(f"{module}.weight") in stored)
        )

    def _place(self, module: str, sites: Mapping[str, Site]) -> _Place:
        target = self._base.weight_map.resolve_module(module)
        site = sites.get(target.name)
        if site is not None:
            return _Place(module, site, target)
        names = [name for path in sites for name in self._base.weight_map.members(path)]
        close = nearest(self._base.weight_map.canonical(module), names)
        raise AdapterError(
            f"{self.path} changes {module!r}, which {self._base.spec.model_type!r} does not have here; it was trained on "
            f"{self.files.trained_on}",
            hint=f"the nearest layer here is {close!r}" if close else "load it with the base that it was trained on",
        )

    def _site_deltas(self, pieces: list[tuple[_Place, Piece]]) -> list[Delta]:
        """Everything that is done at one site: replacements first, then low-rank updates, then shifts of biases."""
        model = self._base.model
        first: list[Delta] = []
        last: list[Delta] = []
        plain: list[tuple[_Place, Tensor, Tensor, Tensor | None]] = []
        for place, piece in pieces:
            weight, bias = (self._replaced(place, name, getattr(piece, name)) for name in ("weight", "bias"))
            if weight is not None or (bias is not None and not isinstance(place.site, Linear)):
                first.append(
                    Replacement(
                        _to(weight, model.dtype, model.device), _to(bias, model.dtype, model.device), place.part
                    )
                )
            elif bias is not None:
                old = place.base("bias")
                shift = bias - old.float() if old is not None else bias
                last.append(Shift(shift.to(model.device, model.dtype), place.part))
            if piece.a is not None:
                update = self._low_rank(place, piece, weight)
                if isinstance(update, Dora):
                    first.append(update)
                else:
                    plain.append((place, *update))
            if piece.embedding_a is not None:
                first.append(self._embedding(place, piece, weight))
            if piece.tokens is not None:
                first.append(self._tokens(place, piece.tokens))
        joined = [_joined(plain, model.dtype, model.device)] if plain else []
        return [*first, *joined, *last]

    def _replaced(self, place: _Place, name: str, tensor: Tensor | None) -> Tensor | None:
        """A weight or bias that stands in for the base's; None when there is none, or it is the same."""
        if tensor is None:
            return None
        tensor = self._base.weight_map.resolve(f"{place.module}.{name}").arranged(
            tensor
        )  # a matrix may be stored [in, out]
        old = place.base(name)
        if old is None or tensor.shape != old.shape:
            shape = list(old.shape) if old is not None else "none"
            raise AdapterError(
                f"{self.path} holds a {name} of {place.module!r} with shape {list(tensor.shape)}; the base's is {shape}",
                hint="an adapter whose vocabulary was resized needs a base of the same size",
            )
        same = torch.equal(tensor.to(old.dtype), old.cpu())
        return None if same else tensor.float()

    def _low_rank(
        self, place: _Place, piece: Piece, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None] | Dora:
        """A, B and its bias, with the scale, of a plain update; or the whole of one with a magnitude."""
        a, b = piece.a, piece.b
        assert a is not None
        assert b is not None
        if not isinstance(place.site, Linear):
            raise AdapterError(f"{self.path} has lora_A for {place.module!r}, which is a {type(place.site).__name__}")
        if a.shape[1] != place.site.in_features or b.shape[0] != place.rows:
            raise AdapterError(
                f"{self.path} does not fit {place.module!r}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, the base "
                f"maps {place.site.in_features} to {place.rows}; it was trained on {self.files.trained_on}",
                hint="load it with the base that it was trained on",
            )
        scale = self.files.scale(place.module, a.shape[0])
        a, b = a.float(), place.target.arranged(b.float()) * scale
        bias = place.target.arranged(piece.b_bias.float()) * scale if piece.b_bias is not None else None
        if piece.magnitude is None:
            return a, b, bias
        if bias is not None:
            raise AdapterError(
                f"{self.path} has both a magnitude and a lora_B bias for {place.module!r}, which is not served"
            )
        whole = weight if weight is not None else place.base("weight")
        assert whole is not None
        norm = (whole.float().cpu() + b @ a).norm(dim=1)  # [out]
        gain = place.target.arranged(piece.magnitude.float().flatten()) / norm
        device, dtype = self._base.model.device, self._base.model.dtype
        return Dora(a.to(device, dtype), b.to(device, dtype), gain.to(device, dtype), place.part)

    def _embedding(self, place: _Place, piece: Piece, weight: Tensor | None) -> EmbeddingLowRank:
        a, b = piece.embedding_a, piece.embedding_b
        assert a is not None
        assert b is not None
        site = place.site
        if not isinstance(site, Embedding) or a.shape[1] != site.in_features or b.shape[0] != site.out_features:
            raise AdapterError(
                f"{self.path} does not fit {place.module!r}: lora_embedding_A is {list(a.shape)} and lora_embedding_B "
                f"{list(b.shape)}, the base is a {type(site).__name__} of [{site.in_features}, {site.out_features}]"
            )
        b = b.float() * self.files.scale(place.module, a.shape[0])
        gain = None
        if piece.magnitude is not None:
            whole = weight if weight is not None else site.dense_weight()
            gain = piece.magnitude.float().flatten() / (whole.float().cpu() + a.float().t() @ b.t()).norm(dim=0)
        device, dtype = self._base.model.device, self._base.model.dtype
        return EmbeddingLowRank(a.t().contiguous().to(device, dtype), b.to(device, dtype), _to(gain, dtype, device))

    def _tokens(self, place: _Place, rows: Tensor) -> Delta:
        ids = self.files.token_ids(place.module)
        vocab, dim = place.site.dense_weight().shape
        if list(rows.shape) != [len(ids), dim] or not all(0 <= index < vocab for index in ids):
            raise AdapterError(
                f"{self.path} trains {list(rows.shape)} rows of {place.module!r} for {len(ids)} token ids; the base has "
                f"{vocab} rows of {dim}"
            )
        order = sorted(range(len(ids)), key=ids.__getitem__)
        at = torch.tensor([ids[i] for i in order], device=self._base.model.device)
        new = rows[order].to(self._base.model.device, self._base.model.dtype)
        return TokenRows(at, new) if isinstance(place.site, Embedding) else TokenLogits(at, new)

    def _tie_bases(self, deltas: dict[str, list[Delta]], places: Mapping[str, list[tuple[_Place, Piece]]]) -> None:
        """A weight beneath a low-rank update (`base_layer`) is the base's, so of a tie it changes both sides, as in PEFT."""
        for name in [name for name in self._base.weight_map.tie if self._base.is_tied(name)]:
            sides = [path.rpartition(".")[0] for path in (self._base.weight_map.tie[name], name)]
            for one, other in (sides, sides[::-1]):
                updated = any(p.a is not None or p.embedding_a is not None for _, p in places.get(one, []))
                new = next((delta for delta in deltas.get(one, []) if isinstance(delta, Replacement)), None)
                if not updated or new is None or other not in self._base.model.sites:
                    continue
                if other in places:
                    raise AdapterError(
                        f"{self.path} changes {other!r} and the weight beneath {one!r}, which are tied; that is not served"
                    )
                deltas[other] = [new]

    def _tie_tokens(self, deltas: dict[str, list[Delta]]) -> None:
        """Trained tokens act on both sides of a tie, as in PEFT; every other delta on one side leaves the other alone.

        In the head the new rows are part of the weight: they come after one that stands in for it, and before what is added.
        """
        for head, embedding in self._base.weight_map.tie.items():
            source, other = embedding.rpartition(".")[0], head.rpartition(".")[0]
            tied = other in self._base.model.sites and self._base.is_tied(head)
            tokens = [delta for delta in deltas.get(source, []) if isinstance(delta, TokenRows)]
            found = deltas.get(other, [])
            if tied and tokens and not any(isinstance(delta, TokenLogits) for delta in found):
                weights = [delta for delta in found if isinstance(delta, Replacement)]
                added = [delta for delta in found if not isinstance(delta, Replacement)]
                deltas[other] = [*weights, *(TokenLogits(delta.ids, delta.rows) for delta in tokens), *added]


def _to(tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return tensor.to(device, dtype) if tensor is not None else None


def _joined(
    members: list[tuple[_Place, Tensor, Tensor, Tensor | None]], dtype: torch.dtype, device: torch.device
) -> LowRank:
    """The updates of a layer's parts as one: A stacked `[sum of ranks, in]`, a block of B for each. Members are `(place, a, b,
    bias)` as PEFT has them, the scale in b and bias."""
    blocks: list[Block] = []
    rank = 0
    bias = torch.zeros(members[0][0].site.out_features) if any(one[3] is not None for one in members) else None
    for place, a, b, own in members:
        rows = place.part or slice(0, place.site.out_features)
        blocks.append(Block(slice(rank, rank + len(a)), rows.start, b.t().contiguous().to(device, dtype)))
        rank += len(a)
        if bias is not None and own is not None:
            bias[rows] = own
    return LowRank(torch.cat([a for _, a, _, _ in members]).to(device, dtype), tuple(blocks), _to(bias, dtype, device))
