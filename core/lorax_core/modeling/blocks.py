"""What several architectures share: BERT's encoder, whose blocks normalise after their residuals.

Decides its configuration, and the order of norms, residuals and products. Knows nothing of checkpoints: what its modules are
called there is `post_norm_map`'s to say.
"""

from __future__ import annotations

from typing import Self, cast

from pydantic import PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from lorax_core.modeling.activation import get_activation
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.embedding import Embedding
from lorax_core.modeling.linear import Linear, QKVLinear
from lorax_core.modeling.norm import LayerNorm


class PostNormConfig(ModelConfig):
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
            raise ValueError("an encoder that sees only backwards is not served")
        return value

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings


class PostNormEmbeddings(nn.Module):
    """Word, position and token type, summed and normalised."""

    def __init__(self, config: PostNormConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def positions(self, batch: Batch) -> Tensor:
        """Rows of the position table, `[tokens]`."""
        return batch.position_ids

    def forward(self, batch: Batch) -> Tensor:
        words = self.word_embeddings(batch.input_ids, batch)  # [tokens, hidden]
        types = self.token_type_embeddings(batch.token_type_ids, batch)
        positions = self.position_embeddings(self.positions(batch), batch)
        return cast("Tensor", self.LayerNorm(words + types + positions, batch))


class PostNormAttention(nn.Module):
    """Bidirectional self-attention, normalised after its residual: x `[tokens, hidden]` to the same shape."""

    def __init__(self, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        dim = hidden // heads
        self.qkv = QKVLinear(hidden, heads, heads, dim)
        self.attention = Attention(heads, heads, dim, causal=False)
        self.dense = Linear(hidden, hidden)
        self.LayerNorm = LayerNorm(hidden, eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv.project(x, batch)  # [tokens, heads, dim] each
        attended = self.dense(self.attention(q, k, v, batch), batch)
        return cast("Tensor", self.LayerNorm(attended + x, batch))


class PostNormLayer(nn.Module):
    """BERT's block: attention, then a feed-forward layer with activation `act`, each normalised after its residual."""

    def __init__(self, hidden: int, heads: int, intermediate: int, act: str, eps: float) -> None:
        super().__init__()
        self.attention = PostNormAttention(hidden, heads, eps)
        self.intermediate = Linear(hidden, intermediate)
        self.act = get_activation(act)
        self.output = Linear(intermediate, hidden)
        self.LayerNorm = LayerNorm(hidden, eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.attention(x, batch)
        inner = self.act(self.intermediate(x, batch))  # [tokens, intermediate]
        return cast("Tensor", self.LayerNorm(self.output(inner, batch) + x, batch))


class PostNormEncoder(nn.Module):
    """Embeddings and layers: a batch to hidden rows `[tokens, hidden]`. `embeddings` may be an architecture's own."""

    def __init__(self, config: PostNormConfig, embeddings: nn.Module | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings or PostNormEmbeddings(config)
        width = config.hidden_size, config.num_attention_heads, config.intermediate_size
        self.layers = nn.ModuleList(
            PostNormLayer(*width, config.hidden_act, config.layer_norm_eps) for _ in range(config.num_hidden_layers)
        )

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.embeddings(batch)
        for layer in self.layers:
            x = layer(x, batch)
        return x
