"""How the rows of the first layer come from tables: words, positions, token types, and a norm of their sum.

Decides it by numbers, from one pass; how positions are counted and what token types add, from a second one, whose tokens hold
padding. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lorax_core.modeling.encoder import text_positions
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.formulas import NormFormula, norm_formula
from lorax_core.scaffold.record import ModuleCall, Record, observe, same

_PADDED: Final = (4, 8)
"""Where the second pass has padding."""


@dataclass(frozen=True)
class EmbeddingFacts:
    """The tables that are summed, and how.

    `position_offset` is the row for position 0, None where positions are counted after the padding id. `types` are the rows of
    a table of token types. `norm` is that of the sum, None without one.
    """

    words: str
    scale: float
    table: str | None = None
    positions: int | None = None
    position_offset: int | None = None
    after_padding: bool = False
    type_table: str | None = None
    types: int | None = None
    norm: NormFormula | None = None
    norm_name: str | None = None


@torch.inference_mode()
def find_embeddings(record: Record, config: Any, x: Tensor, stem: str, numbers: Sequence[float]) -> EmbeddingFacts:
    """Where the rows `x` of the first layer, which is below `stem`, come from."""
    normed = _norm(record, x, stem, numbers)
    total = x if normed is None else normed[0].x
    found = _sum(record, config, total, numbers)
    if normed is None:
        return found
    call, formula = normed
    types = {"norm": formula, "norm_name": call.name}
    if found.table is not None:
        types |= _second_pass(record, config, found, call.name)
    return EmbeddingFacts(**{**vars(found), **types})


def _norm(record: Record, x: Tensor, stem: str, numbers: Sequence[float]) -> tuple[ModuleCall, NormFormula] | None:
    """The norm that made the rows of the first layer."""
    for call in record.calls:
        if call.name.startswith(f"{stem}."):
            return None
        if call.y.shape == x.shape and same(call.y, x) and (formula := norm_formula(call, numbers)) is not None:
            return call, formula
    return None


def _tables(record: Record) -> tuple[nn.Embedding, list[nn.Embedding], dict[nn.Module, str]]:
    """The table of words, the others, and the names of all."""
    words = cast("nn.Embedding", record.model.get_input_embeddings())  # type: ignore[operator]
    others = [one for one in record.model.modules() if isinstance(one, nn.Embedding) and one is not words]
    return words, others, {module: name for name, module in record.model.named_modules()}


def _sum(record: Record, config: Any, total: Tensor, numbers: Sequence[float]) -> EmbeddingFacts:
    """The tables whose rows add up to `total`: words, scaled, perhaps positions, perhaps the first token type."""
    table, others, names = _tables(record)
    words = table.weight[record.ids[0]]
    # Those of padding ids too: positions may be counted after them.
    offsets = dict.fromkeys([*range(4), (getattr(config, "pad_token_id", None) or 0) + 1])
    for scale in dict.fromkeys([1.0, words.shape[-1] ** 0.5, *numbers]) if words.shape == total.shape else ():
        if same(total, scale * words):
            return EmbeddingFacts(names[table], scale)
        for kinds, rest in _without_types(total - scale * words, others):
            for other in others:
                for offset in offsets:
                    if same(rest, other.weight[offset : offset + len(rest)], 1e-4):
                        found = EmbeddingFacts(names[table], scale, names[other], other.num_embeddings - offset, offset)
                        types = {} if kinds is None else {"type_table": names[kinds], "types": kinds.num_embeddings}
                        return EmbeddingFacts(**{**vars(found), **types})
    raise NotUnderstood(
        ["the first layer's rows are not those of words, scaled, with those of learned positions or without"]
    )


def _without_types(rest: Tensor, tables: Sequence[nn.Embedding]) -> Iterator[tuple[nn.Embedding | None, Tensor]]:
    yield None, rest
    for kinds in tables:
        if kinds.embedding_dim == rest.shape[-1]:
            yield kinds, rest - kinds.weight[0]


def _second_pass(record: Record, config: Any, found: EmbeddingFacts, norm: str) -> dict[str, Any]:
    """How positions are counted where there is padding, and that token types choose rows of their table."""
    assert found.position_offset is not None
    modules = dict(record.model.named_modules())
    padding = getattr(config, "pad_token_id", None)
    ids, more = record.ids.clone(), {}
    if padding is not None:
        ids[0, list(_PADDED)] = padding
    rest = cast("Tensor", modules[found.words].weight)[ids[0]] * found.scale
    if found.types is not None:
        kinds = torch.arange(ids.shape[1]) % found.types
        more["token_type_ids"] = kinds[None]
        rest = rest + cast("Tensor", modules[str(found.type_table)].weight)[kinds]
    call = observe(record.model, ids, **more).of(norm)
    assert call is not None
    table = cast("Tensor", modules[str(found.table)].weight)
    plain = torch.arange(ids.shape[1])
    if same(call.x, rest + table[plain + found.position_offset], 1e-4):
        return {}
    counted = None if padding is None else table[text_positions(ids[0], plain, padding)]
    if counted is None or not same(call.x, rest + counted, 1e-4):
        raise NotUnderstood(
            ["positions that are counted neither from 0 nor after the padding id, or unusual token types"]
        )
    return {"positions": table.shape[0], "position_offset": None, "after_padding": True}
