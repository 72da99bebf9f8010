"""What the conformance kit tests RoBERTa and its kin with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from typing import Any

from lorax_core.plugins import ArchitectureCases, Task

_LATE_PADDING = {"late_padding": {"pad_token_id": 5, "max_position_embeddings": 70}}
"""Padding id 5 takes six rows, so 70 rows leave 64 positions again."""


_LATE_PADDING = {"late_padding": {"pad_token_id": 5, "max_position_embeddings": 70}}
"""Padding id 5 takes six rows, so 70 rows leave 64 positions again."""


def _cases(name: str, variants: dict[str, dict[str, Any]]) -> ArchitectureCases:
    """The cases of the architecture whose classes in transformers begin with `name`."""
    return ArchitectureCases(
        tiny_config={
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            # 64 positions and the two rows that the padding id 1 takes.
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
            "pad_token_id": 1,
        },
        variants=variants,
        references={
            Task.EMBED: f"transformers:{name}Model",
            Task.TOKEN_CLASSIFICATION: f"transformers:{name}ForTokenClassification",
            Task.SEQUENCE_CLASSIFICATION: f"transformers:{name}ForSequenceClassification",
        },
    )


ROBERTA = _cases(
    "Roberta",
    {
        "padding_at_zero": {"pad_token_id": 0},
        **_LATE_PADDING,
        "two_token_types": {"type_vocab_size": 2},
        "tanh_gelu": {"hidden_act": "gelu_new"},
        "wide_epsilon": {"layer_norm_eps": 0.1},
        "odd_vocabulary": {"vocab_size": 131},
    },
)
# The classes are those of RoBERTa, so all other variants would run the same code again.
XLMROBERTA = _cases("XLMRoberta", _LATE_PADDING)
CAMEMBERT = _cases("Camembert", _LATE_PADDING)
