"""What the `config.json` of a RoBERTa, XLM-RoBERTa or CamemBERT checkpoint says."""

from __future__ import annotations

from typing import ClassVar

from lorax_core.modeling import PostNormConfig


class RobertaConfig(PostNormConfig):
    """The fields of an encoder with BERT's blocks, and positions that are counted from the padding id."""

    positions_after_padding: ClassVar[bool] = True

    pad_token_id: int | None = 1
