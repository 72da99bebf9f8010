"""What a BERT checkpoint's `config.json` says."""

from __future__ import annotations

from lorax_core.modeling import PostNormConfig


class BertConfig(PostNormConfig):
    """The fields of an encoder with BERT's blocks; BERT has none of its own."""
