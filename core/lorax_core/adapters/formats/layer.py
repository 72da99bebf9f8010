"""From the tensors that PEFT saved for one module to what is done at one layer.

Decides the deltas of a module, in float32 and for a whole layer, and what a change of one side of a tie means for the other.
Binding puts the deltas on a site or a part of one; merging puts them into a checkpoint's tensor. Knows nothing of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from lorax_core.adapters.base import Delta
from lorax_core.adapters.deltas import Dora, EmbeddingLowRank, LowRank, Replacement, Shift, TokenLogits, TokenRows
from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles
from lorax_core.adapters.formats.tensors import equal
from lorax_core.errors import AdapterError

MAX_RANK: Final = 4_096
"""The largest rank of an update of a small layer; those of large ones may be as large as the layer."""


@dataclass(frozen=True)
class Layer:
    """The base layer, or the part of a fused one, that a module of the files stands for.

    `shape` is the weight's and `kind` what the layer is called in errors. `embeds`: it takes ids. `multiplies`: it is a matrix
    product, so that low-rank updates fit. `shifts`: a new bias is added as its difference from the base's, and does not replace
    the whole layer. `device` is where deltas are made: the host, or the meta device for a check.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    embeds: bool
    multiplies: bool
    shifts: bool
    device: torch.device
    base: Callable[[str], Tensor | None]
    """The base's own "weight" `[out, in]` or "bias" `[out]`; None when it has none."""
    saved: Callable[[str, Tensor], Tensor]
    """A weight or bias as the files have it, in the layer's orientation."""
    rows: Callable[[Tensor], Tensor]
    """Output rows as the files have them (B, a magnitude, B's bias), in the layer's order."""


def layer_deltas(files: PeftFiles, tensors: ModuleTensors, layer: Layer) -> list[Delta]:
    """Everything that is done at one layer, in order: what stands in for the base's numbers, then what is added to it.

    Raises AdapterError naming the module whose tensors do not fit the layer.
    """
    made: list[Delta] = []
    weight, bias = (_replaced(files, layer, leaf, getattr(tensors, leaf)) for leaf in ("weight", "bias"))
    # The bias of a product is shifted: a magnitude scales the product, and the base's own bias stays outside of it.
    whole = bias if weight is None or tensors.magnitude is None else None
    if weight is not None or (whole is not None and not layer.shifts):
        made.append(Replacement(weight, whole))
        bias = None if whole is not None else bias
    if tensors.tokens is not None:
        made.append(_tokens(files, tensors.tokens, tensors.token_ids, layer))
    if tensors.a is not None:
        made.append(_low_rank(files, tensors, layer, weight))
    if tensors.embedding_a is not None:
        made.append(_embedding(files, tensors, layer, weight))
    if bias is not None:
        old = layer.base("bias")
        made.append(Shift(bias if old is None else bias - old.float().to(bias.device)))
    return made


def share_tie(
    files: PeftFiles, modules: Sequence[str], embedding: ModuleTensors | None, head: ModuleTensors | None
) -> tuple[ModuleTensors | None, ModuleTensors | None]:
    """What changes of the two sides of a tied weight come to, as in PEFT; `modules` are their names in the files.

    A weight under a low-rank update (`base_layer`) is the base's, so it is that of both sides. Trained tokens change both
    sides. Everything else changes the side that it names alone. Raises AdapterError when these two weights differ.
    """
    under = [
        side.weight
        for side in (embedding, head)
        if side is not None and side.weight is not None and side.rank is not None
    ]
    if len(under) == 2 and not equal(*under):
        raise AdapterError(
            f"{files.path} holds one weight under the update of '{modules[0]}.weight' and another under that of its tied "
            f"head {modules[1]!r}",
            hint="the base has one weight for both: leave one of the two out of target_modules, and train again",
        )
    if under:
        embedding, head = (
            side if side is not None and side.weight is not None else replace(side or ModuleTensors(), weight=under[0])
            for side in (embedding, head)
        )
    return embedding, share_tokens(embedding, head)


def share_tokens(embedding: ModuleTensors | None, head: ModuleTensors | None) -> ModuleTensors | None:
    """The head's tensors with the embedding's trained tokens, which lie under what else is done to the head."""
    if embedding is None or embedding.tokens is None or (head is not None and head.tokens is not None):
        return head
    return replace(head or ModuleTensors(), tokens=embedding.tokens, token_ids=embedding.token_ids)


def _replaced(files: PeftFiles, layer: Layer, leaf: str, tensor: Tensor | None) -> Tensor | None:
    """A weight or bias that stands in for the base's; None when there is none, or it is the same."""
    if tensor is None:
        return None
    tensor, old = layer.saved(leaf, tensor), layer.base(leaf)
    if old is None or tensor.shape != old.shape:
        raise AdapterError(
            f"{files.path} holds a {leaf} of {layer.module!r} with shape {list(tensor.shape)}; the base's is "
            f"{list(old.shape) if old is not None else 'none'}",
            hint="an adapter whose vocabulary was resized needs a base of the same size",
        )
    # In the base's dtype: a copy saved in another precision is no change, and would cost a whole layer.
    return None if not tensor.is_meta and equal(tensor.to(old.dtype), old.cpu()) else tensor.float()


def _low_rank(files: PeftFiles, tensors: ModuleTensors, layer: Layer, weight: Tensor | None) -> LowRank | Dora:
    a, b = tensors.a, tensors.b
    assert a is not None
    assert b is not None
    if not layer.multiplies:
        raise AdapterError(
            f"{files.path} has lora_A for {layer.module!r}, which is of kind {layer.kind}",
            hint="leave it out of target_modules and train again; lora_embedding_A is for embeddings",
        )
    out, inputs = layer.shape
    if a.shape[1] != inputs or b.shape[0] != out:
        raise _misfit(
            files, layer, f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}, the base maps {inputs} to {out}"
        )
    _check_rank(files, layer, len(a))
    if tensors.b_bias is not None and list(tensors.b_bias.shape) != [out]:
        raise _misfit(files, layer, f"lora_B.bias is {list(tensors.b_bias.shape)}, the base has {out} outputs")
    scale = files.settings.scale(layer.module, a.shape[0])
    a, b = a.float(), _scaled(layer.rows(b.float()), scale)  # [rank, in], [out, rank]
    if tensors.magnitude is None:
        bias = _scaled(layer.rows(tensors.b_bias.float()), scale) if tensors.b_bias is not None else None
        return LowRank.whole(a, b, bias)
    if tensors.b_bias is not None:
        raise AdapterError(
            f"{files.path} has both a magnitude and a lora_B bias for {layer.module!r}, which is not supported",
            hint="train it with use_dora or with lora_bias, not with both",
        )
    # Weights do not change while serving, so DoRA's norm is taken once here and not in every forward as in PEFT.
    under, magnitude = _under(layer, weight), layer.rows(_magnitude(files, tensors, layer, out))  # [out, in], [out]
    return Dora(a, b, magnitude if b.is_meta else magnitude / (under + b @ a).norm(dim=1))


def _scaled(numbers: Tensor, scale: float) -> Tensor:
    # Without numbers only shapes count, and the product would make torch import its compiler, which takes a second.
    return numbers if numbers.is_meta else numbers * scale


def _embedding(files: PeftFiles, tensors: ModuleTensors, layer: Layer, weight: Tensor | None) -> EmbeddingLowRank:
    a, b = tensors.embedding_a, tensors.embedding_b
    assert a is not None
    assert b is not None
    if not layer.embeds or (a.shape[1], b.shape[0]) != layer.shape:
        raise _misfit(
            files,
            layer,
            f"lora_embedding_A is {list(a.shape)} and lora_embedding_B {list(b.shape)}, the base is "
            f"{'an embedding' if layer.embeds else 'no embedding'} of {list(layer.shape)}",
        )
    _check_rank(files, layer, len(a))
    a, b = a.float().t().contiguous(), _scaled(b.float(), files.settings.scale(layer.module, a.shape[0]))
    if tensors.magnitude is None:
        return EmbeddingLowRank(a, b)
    norm = (_under(layer, weight) + a @ b.t()).norm(dim=0)  # [dim]
    return EmbeddingLowRank(a, b, _magnitude(files, tensors, layer, len(norm)) / norm)


def _check_rank(files: PeftFiles, layer: Layer, rank: int) -> None:
    # A's rows are the one size that the base does not confirm.
    if rank > max(MAX_RANK, *layer.shape):
        raise _misfit(
            files, layer, f"its rank is {rank:,}, more than {MAX_RANK:,} and than the layer has rows or columns"
        )


def _under(layer: Layer, weight: Tensor | None) -> Tensor:
    """The weight that an update lies on, in float32 on the host."""
    if layer.device.type == "meta":
        # Shapes are enough for a check, and reading a packed weight would copy it.
        return torch.empty(layer.shape, device="meta")
    whole = weight if weight is not None else layer.base("weight")
    assert whole is not None
    return whole.float().cpu()


def _magnitude(files: PeftFiles, tensors: ModuleTensors, layer: Layer, size: int) -> Tensor:
    assert tensors.magnitude is not None
    if tensors.magnitude.numel() != size:
        raise _misfit(
            files, layer, f"its magnitude has shape {list(tensors.magnitude.shape)}, the base asks for [{size}]"
        )
    return tensors.magnitude.float().flatten()


def _tokens(files: PeftFiles, rows: Tensor, ids: tuple[int, ...], layer: Layer) -> TokenRows | TokenLogits:
    vocab, dim = (*layer.shape, 0)[:2]  # a vector has one size only, and then nothing fits
    if list(rows.shape) != [len(ids), dim] or not all(0 <= index < vocab for index in ids):
        raise AdapterError(
            f"{files.path} trains {list(rows.shape)} rows of {layer.module!r} for {len(ids)} token ids; the base has "
            f"{vocab} rows of {dim}",
            hint="load it on the base that it was trained on; base_model_name_or_path in adapter_config.json names it",
        )
    # Ascending, for searchsorted in `TokenRows`; the files may have any order.
    order = sorted(range(len(ids)), key=ids.__getitem__)
    at, new = torch.tensor([ids[i] for i in order]), rows[order].float()
    return TokenRows(at, new) if layer.embeds else TokenLogits(at, new)


def _misfit(files: PeftFiles, layer: Layer, what: str) -> AdapterError:
    return AdapterError(
        f"{files.path} does not fit {layer.module!r}: {what}; it was trained on {files.settings.trained_on}",
        hint="use the base that it was trained on",
    )
