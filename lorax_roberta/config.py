"""What the `config.json` of a RoBERTa, XLM-RoBERTa or CamemBERT checkpoint says."""

from __future__ import annotations

from pydantic import PositiveInt, field_validator, model_validator

from lorax_core.modeling import ModelConfig


class RobertaConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    @field_validator("position_embedding_type")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value != "absolute":
            raise ValueError("only 'absolute' positions are served")
        return value

    @field_validator("is_decoder")
    @classmethod
    def _encoder(cls, value: bool) -> bool:
        if value:
            raise ValueError("a RoBERTa that sees only backwards is not served")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> RobertaConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.padding < 0 or self.max_tokens < 1:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position after pad_token_id {self.padding}"
            )
        return self

    @property
    def padding(self) -> int:
        """`pad_token_id`, which positions are counted from; RoBERTa's own is 1."""
        return 1 if self.pad_token_id is None else self.pad_token_id

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings - self.padding - 1
