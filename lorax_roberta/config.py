"""What the `config.json` of a RoBERTa, XLM-RoBERTa or CamemBERT checkpoint says."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from lorax_core.modeling import PostNormConfig


class RobertaConfig(PostNormConfig):
    """The fields of an encoder with BERT's blocks, and positions that are counted from the padding id."""

    pad_token_id: int | None = 1

    @model_validator(mode="after")
    def _positions_are_left(self) -> Self:
        if self.padding < 0 or self.max_tokens < 1:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position after pad_token_id {self.padding}"
            )
        return self

    @property
    def padding(self) -> int:
        """`pad_token_id`, which positions are counted from; RoBERTa's own is 1."""
        # For files that have null there.
        return 1 if self.pad_token_id is None else self.pad_token_id

    @property
    def max_tokens(self) -> int:
        # Rows 0 to `padding` of the table are never a real token's: of 514 rows, 512 are left.
        return self.max_position_embeddings - self.padding - 1
