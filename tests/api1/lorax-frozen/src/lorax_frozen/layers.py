"""OPT, of core's layers instead of its blocks where there is a choice."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Self

import torch
from torch import Tensor, nn

from lorax_core.modeling import (
    MLP,
    Attention,
    Batch,
    Block,
    Embedding,
    GatedMLP,
    GateUpLinear,
    HasAdapters,
    Head,
    HeadRows,
    LayerNorm,
    Linear,
    ModelConfig,
    Norm,
    QKVLinear,
    SelfAttention,
    SequenceClassificationHead,
    Task,
    get_activation,
)
from lorax_core.weights import WeightMap
from lorax_frozen.config import OptConfig


class PlainNorm(Norm):
    """A norm written out, for the last of all."""

    def __init__(self, size: int, weight: bool) -> None:
        super().__init__(size, 1e-5, bias=weight, weight=weight)

    def compute(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return nn.functional.layer_norm(x, (self.in_features,), weight, bias, self.eps)


class PlainAttention(Block):
    """Projections and attention, put together by hand."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.qkv_proj = QKVLinear(config.hidden_size, heads, heads, dim, config.enable_bias)
        self.attention = Attention(heads, heads, dim, causal=True, scale=None, window=None, soft_cap=None)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, config.enable_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj.project(x, batch)
        return self.o_proj(self.attention(q, k, v, batch), batch)


class PlainMLP(Block):
    """`down(act(up(x)))`, put together by hand."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.ffn_dim, config.enable_bias)
        self.act = get_activation(config.activation_function)
        self.down_proj = Linear(config.ffn_dim, config.hidden_size, config.enable_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x, batch)), batch)


class OwnGatedMLP(GatedMLP):
    """No architecture here has one; it is made all the same."""

    def __init__(self) -> None:
        super().__init__(8, 16, "silu", bias=False)
        assert isinstance(self.gate_up_proj, GateUpLinear)


class OptLayer(Block):
    """Layers by turns of core's blocks and of those above."""

    def __init__(self, config: OptConfig, plain: bool) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.enable_bias
        weight = config.layer_norm_elementwise_affine
        self.self_attn = (
            PlainAttention(config) if plain else SelfAttention(hidden, config.num_attention_heads, causal=True, bias=bias)
        )
        self.mlp = PlainMLP(config) if plain else MLP(hidden, config.ffn_dim, config.activation_function, bias=bias)
        self.input_layernorm = LayerNorm(hidden, 1e-5, bias=True, weight=weight)
        self.post_attention_layernorm = LayerNorm(hidden, 1e-5, weight=weight)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x, batch), batch)
        normed, x = self.post_attention_layernorm.add(attended, x, batch)
        return x + self.mlp(normed, batch)


class OptBackbone(nn.Module):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: OptConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, scale=1.0)
        self.embed_positions = Embedding(config.max_position_embeddings + 2, config.hidden_size)
        self.layers = nn.ModuleList(OptLayer(config, plain=at % 2 == 0) for at in range(config.num_hidden_layers))
        self.norm = PlainNorm(config.hidden_size, config.layer_norm_elementwise_affine)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.input_ids, batch) + self.embed_positions(batch.position_ids + 2, batch)
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x, batch)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as transformers saves them."""
        return WeightMap(
            prefixes=("model.decoder", "decoder", "model"),
            rename={
                "layers.*.self_attn_layer_norm.**": "layers.*.input_layernorm.**",
                "layers.*.final_layer_norm.**": "layers.*.post_attention_layernorm.**",
                "layers.*.self_attn.out_proj.**": "layers.*.self_attn.o_proj.**",
                "layers.*.fc2.**": "layers.*.mlp.down_proj.**",
                "layers.*.fc1.**": "layers.*.mlp.up_proj.**",
                "final_layer_norm.**": "norm.**",
            },
            fuse={"layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")},
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            ignore=("qa_outputs.**",),
        )


class PlainHead(Head):
    """A language model's head, put together by hand."""

    task = Task.GENERATE
    fewest_bits = 8

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        return cls(config) if config.tie_word_embeddings or "lm_head.weight" in names else None

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        return self.lm_head(hidden, rows).float()


class PlainScoreHead(SequenceClassificationHead):
    """A classifier of sequences, which reads the last token that is not padding."""

    needed = ("score.weight",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.padding = config.pad_token_id
        self.score = Linear(config.hidden_size, len(self.labels), bias=False)

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        last = next((at for at in reversed(range(len(ids))) if ids[at] != self.padding), 0)
        return range(last, last + 1)

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        return torch.as_tensor(self.score(hidden, rows))
