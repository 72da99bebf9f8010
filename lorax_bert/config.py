"""What a BERT checkpoint's `config.json` says."""

from __future__ import annotations

from pydantic import field_validator

from lorax_core.modeling import ModelConfig


class BertConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    position_embedding_type: str = "absolute"

    @field_validator("position_embedding_type")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value != "absolute":
            raise ValueError("only 'absolute' positions are served")
        return value

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings
