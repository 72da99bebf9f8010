"""Variants that the kit adds to those of an architecture: heads of the sizes that kernels treat differently.

Decides which sizes there must be and how a tiny configuration states them. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorax_core.plugins.cases import HEAD_SIZES, ArchitectureCases


def with_head_sizes(cases: ArchitectureCases, aliases: Mapping[str, str]) -> ArchitectureCases:
    """The cases with a variant `heads_of_N` for each size that none of theirs has.

    `aliases` are those of the architecture's `ModelConfig`. Nothing is added where `tiny_config` does not state how wide the
    model is and how many heads it has.
    """
    spelt = {common: own for own, common in aliases.items() if own in cases.tiny_config}
    width, heads = (spelt.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    count = cases.tiny_config.get(heads)
    if not isinstance(count, int) or width not in cases.tiny_config:
        return cases
    found = {_size(cases.config(name), width, heads) for name in ("", *cases.variants)}
    added: dict[str, Any] = {}
    for size in HEAD_SIZES:
        if size not in found:
            # Heads may have a size of their own; the width changes with it all the same, for it is another one to test.
            own = {"head_dim": size} if "head_dim" in cases.tiny_config else {}
            added[f"heads_of_{size}"] = {width: count * size, **own}
    return cases.model_copy(update={"variants": {**added, **cases.variants}})


def _size(config: Mapping[str, Any], width: str, heads: str) -> int | None:
    """How wide the heads of a variant are, as far as it says so."""
    own = config.get("head_dim")
    if isinstance(own, int):
        return own
    whole, count = config.get(width), config.get(heads)
    return whole // count if isinstance(whole, int) and isinstance(count, int) and count else None
