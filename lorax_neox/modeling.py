"""GPT-NeoX: transformer blocks with partly rotary positions, whose attention and feed-forward may run side by side.

Computes hidden rows of packed sequences. Knows nothing of caches, heads or adapters.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lorax_core.kernels.elementwise import Angles
from lorax_core.modeling import (
    Attention,
    Batch,
    Embedding,
    LayerNorm,
    Linear,
    Model,
    ModelConfig,
    QKVLinear,
    RotaryEmbedding,
    Task,
    get_activation,
)
from lorax_core.weights import WeightMap
from lorax_neox.config import GPTNeoXConfig


class GPTNeoXAttention(nn.Module):
    """Causal self-attention; positions turn the first part of each head."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads
        dim = config.hidden_size // heads
        self.query_key_value = QKVLinear(config.hidden_size, heads, heads, dim, bias=config.attention_bias)
        self.attention = Attention(heads, heads, dim, causal=True)
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, rotary: RotaryEmbedding, angles: Angles, batch: Batch) -> Tensor:
        q, k, v = self.query_key_value.project(x, batch)  # [tokens, heads, dim] each
        attended = self.attention(rotary(q, angles), rotary(k, angles), v, batch)
        return cast("Tensor", self.dense(attended, batch))


class GPTNeoXMLP(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.act = get_activation(config.hidden_act)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        inner = self.act(self.dense_h_to_4h(x, batch))  # [tokens, intermediate]
        return cast("Tensor", self.dense_4h_to_h(inner, batch))


class GPTNeoXLayer(nn.Module):
    """Attention and feed-forward, each on normalised input: of the same rows when parallel, else one after the other."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = GPTNeoXAttention(config)
        self.mlp = GPTNeoXMLP(config)

    def forward(self, x: Tensor, rotary: RotaryEmbedding, angles: Angles, batch: Batch) -> Tensor:
        attended = x + self.attention(self.input_layernorm(x, batch), rotary, angles, batch)
        seen = x if self.parallel else attended
        return cast("Tensor", attended + self.mlp(self.post_attention_layernorm(seen, batch), batch))


class FlashGPTNeoXModel(nn.Module):
    """Embeddings, layers and the final norm: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.embed_in = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GPTNeoXLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary = RotaryEmbedding(config.hidden_size // config.num_attention_heads, config.rope)

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.embed_in(batch.input_ids, batch)
        angles = self.rotary.angles(batch.position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, self.rotary, angles, batch)
        return cast("Tensor", self.final_layer_norm(x, batch))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as GPTNeoXModel and its task models save them, with or without `gpt_neox.`; q, k, v stand head by head."""
        heads = cast("GPTNeoXConfig", config).num_attention_heads
        return WeightMap(
            prefixes=("gpt_neox",),
            rename={"embed_out.**": "lm_head.**"},
            interleave={"layers.*.attention.query_key_value": (heads, 3)},
            tie={"lm_head.weight": "embed_in.weight"} if config.tie_word_embeddings else {},
            # Causal masks and frequencies that old checkpoints hold, and a head that is not served.
            ignore=(
                "layers.*.attention.bias",
                "layers.*.attention.masked_bias",
                "layers.*.attention.rotary_emb.inv_freq",
                "qa_outputs.**",
            ),
        )


class FlashGPTNeoXForCausalLM(Model):
    """GPT-NeoX that generates."""

    task = Task.GENERATE


class FlashGPTNeoXForEmbeddings(Model):
    """GPT-NeoX for embeddings."""

    task = Task.EMBED
