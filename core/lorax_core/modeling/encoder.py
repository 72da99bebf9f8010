"""Post-norm transformers: BERT's encoder, whose layers normalise after their residuals.

Decides its configuration, how positions are counted, and the order of norms, residuals and blocks. Knows nothing of
checkpoints: `post_norm_map` holds their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from lorax_core.modeling.batch import Batch
from lorax_core.modeling.blocks import MLP, Block, SelfAttention
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.norm import LayerNorm


class PostNormConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers.

    `type_vocab_size` 0 is an encoder without token types. `positions_after_padding` says that positions are counted from the
    padding id, as in RoBERTa: the first token has the row after it, and padding ids do not count.
    """

    positions_after_padding: ClassVar[bool] = False

    intermediate_size: PositiveInt
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    # Relative positions add terms to the scores that no backend computes. Ignored, they would give wrong vectors quietly.
    @field_validator("position_embedding_type")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value != "absolute":
            raise ValueError("only 'absolute' positions are supported")
        return value

    @field_validator("is_decoder")
    @classmethod
    def _encoder(cls, value: bool) -> bool:
        if value:
            raise ValueError("an encoder that attends to earlier tokens only is not supported")
        return value

    @model_validator(mode="after")
    def _positions_are_left(self) -> Self:
        if self.positions_after_padding and (self.padding < 0 or self.max_tokens < 1):
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position after pad_token_id {self.padding}"
            )
        return self

    @property
    def padding(self) -> int:
        """`pad_token_id`, which positions may be counted from; 1 for files that have null there."""
        return 1 if self.pad_token_id is None else self.pad_token_id

    @property
    def max_tokens(self) -> int:
        # Rows 0 to `padding` of the table are then never a real token's: of 514 rows, 512 are left.
        taken = self.padding + 1 if self.positions_after_padding else 0
        return self.max_position_embeddings - taken


def text_positions(input_ids: Tensor, position_ids: Tensor, padding: int) -> Tensor:
    """Rows of the position table for packed sequences, `[tokens]`: tokens count from `padding + 1`, padding ids stay at it.

    A padding id inside a sequence does not count, as in transformers. `position_ids` count from 0 in each sequence.
    """
    real = (input_ids != padding).long()
    seen = real.cumsum(0)  # over the whole batch, so what came before the sequence is taken off
    # [tokens]: the row in the batch where the sequence of each token begins.
    first = torch.arange(len(input_ids), device=input_ids.device) - position_ids
    # `seen - real` is the count before a row, itself not counted. `* real` puts padding ids at `padding` exactly.
    return (seen - (seen - real)[first]) * real + padding


class PostNormEmbeddings(nn.Module):
    """Word, position and token type, summed and normalised; without token types where the configuration counts none."""

    def __init__(self, config: PostNormConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        types = config.type_vocab_size
        # DistilBERT fixes `type_vocab_size` to 0.
        self.token_type_embeddings = Embedding(types, config.hidden_size) if types else None
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.padding = config.padding if config.positions_after_padding else None

    def positions(self, batch: Batch) -> Tensor:
        """Rows of the position table, `[tokens]`."""
        if self.padding is None:
            return batch.position_ids
        return text_positions(batch.input_ids, batch.position_ids, self.padding)

    if TYPE_CHECKING:

        def __call__(self, batch: Batch) -> Tensor: ...

    def forward(self, batch: Batch) -> Tensor:
        x = self.word_embeddings(batch.input_ids, batch)  # [tokens, hidden]
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(batch.token_type_ids, batch)
        normed, _ = self.LayerNorm.add(x, self.position_embeddings(self.positions(batch), batch), batch)
        return normed


class PostNormLayer(Block):
    """Attention, then a feed-forward block, each normalised after its residual."""

    def __init__(self, config: PostNormConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, causal=False)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.post_mlp_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        # Unlike pre-norm, the next residual is the normalised sum, so the plain sum is dropped in both.
        x, _ = self.post_attention_layernorm.add(self.self_attn(x, batch), x, batch)
        x, _ = self.post_mlp_layernorm.add(self.mlp(x, batch), x, batch)
        return x


class PostNormEncoder(nn.Module):
    """Embeddings and layers: a batch to hidden rows `[tokens, hidden]`. `embeddings` may be an architecture's own."""

    def __init__(self, config: PostNormConfig, embeddings: PostNormEmbeddings | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings or PostNormEmbeddings(config)
        self.layers = nn.ModuleList(PostNormLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, batch: Batch) -> Tensor:
        x = self.embeddings(batch)  # [tokens, hidden]
        for layer in self.layers:
            x = layer(x, batch)
        return x
