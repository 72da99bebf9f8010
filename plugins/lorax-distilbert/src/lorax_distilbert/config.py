"""What a DistilBERT checkpoint's `config.json` says."""

from __future__ import annotations

from pydantic import AliasChoices, Field, PositiveInt, model_validator

from lorax_core.modeling import ModelConfig


class DistilBertConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers.

    DistilBERT has names of its own for sizes, and errors tell those; the common names are taken as well. What
    `sinusoidal_pos_embds` says does not matter here: learned or not, the table of positions is in the checkpoint.
    """

    hidden_size: PositiveInt = Field(validation_alias=AliasChoices("dim", "hidden_size"))
    num_hidden_layers: PositiveInt = Field(validation_alias=AliasChoices("n_layers", "num_hidden_layers"))
    num_attention_heads: PositiveInt = Field(validation_alias=AliasChoices("n_heads", "num_attention_heads"))
    hidden_dim: PositiveInt
    activation: str = "gelu"
    max_position_embeddings: PositiveInt = 512

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> DistilBertConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"dim {self.hidden_size} is no multiple of n_heads {self.num_attention_heads}")
        return self

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings
