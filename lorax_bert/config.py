"""What a BERT checkpoint's `config.json` says."""

from __future__ import annotations

from lorax_core.modeling import PostNormConfig


# A class all the same: errors name the plugin by the module of its configuration's class.
class BertConfig(PostNormConfig):
    """The fields of an encoder with BERT's blocks; BERT has none of its own."""
