"""What a DistilBERT checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from lorax_core.modeling import PostNormConfig


class DistilBertConfig(PostNormConfig):
    """The fields of an encoder with BERT's blocks, under DistilBERT's own keys; there are no token types.

    What `sinusoidal_pos_embds` says does not matter here: learned or not, the table of positions is in the checkpoint.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    }
    own_keys: ClassVar[Mapping[str, str]] = {
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
    }

    # A literal: a file that states token types is no DistilBERT, and must not load without them.
    type_vocab_size: Literal[0] = 0
