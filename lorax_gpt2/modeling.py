"""GPT-2: pre-norm transformer blocks over learned positions.

Computes hidden rows of packed sequences. Knows nothing of caches, heads or adapters.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lorax_core.modeling import (
    Attention,
    Batch,
    Embedding,
    LayerNorm,
    Linear,
    Model,
    ModelConfig,
    QKVLinear,
    Task,
    get_activation,
)
from lorax_core.weights import WeightMap
from lorax_gpt2.config import GPT2Config


class GPT2Attention(nn.Module):
    """Causal self-attention.

    `reorder_and_upcast_attn` asks for scores in float32; every backend computes them so, whatever the dtype.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        heads = config.num_attention_heads
        dim = config.hidden_size // heads
        self.c_attn = QKVLinear(config.hidden_size, heads, heads, dim)
        self.attention = Attention(heads, heads, dim, causal=True, scale=config.scale(layer))
        self.c_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.c_attn.project(x, batch)  # [tokens, heads, dim] each
        return cast("Tensor", self.c_proj(self.attention(q, k, v, batch), batch))


class GPT2MLP(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.hidden_size, config.intermediate_size)
        self.act = get_activation(config.activation_function)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        inner = self.act(self.c_fc(x, batch))  # [tokens, intermediate]
        return cast("Tensor", self.c_proj(inner, batch))


class GPT2Block(nn.Module):
    """Attention and feed-forward, each on normalised input and added to what came in."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + self.attn(self.ln_1(x, batch), batch)
        return cast("Tensor", x + self.mlp(self.ln_2(x, batch), batch))


class FlashGPT2Model(nn.Module):
    """Embeddings, blocks and the final norm: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.wte(batch.input_ids, batch) + self.wpe(batch.position_ids, batch)
        for block in self.h:
            x = block(x, batch)
        return cast("Tensor", self.ln_f(x, batch))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as GPT2Model and its task models save them, with or without `transformer.`; matrices stand `[in, out]`."""
        return WeightMap(
            prefixes=("transformer",),
            transpose=(
                "h.*.attn.c_attn.weight",
                "h.*.attn.c_proj.weight",
                "h.*.mlp.c_fc.weight",
                "h.*.mlp.c_proj.weight",
            ),
            tie={"lm_head.weight": "wte.weight"} if config.tie_word_embeddings else {},
            # Causal masks that old checkpoints hold, and heads that are not served.
            ignore=("h.*.attn.bias", "h.*.attn.masked_bias", "multiple_choice_head.**", "qa_outputs.**"),
        )


class FlashGPT2ForCausalLM(Model):
    """GPT-2 that generates."""

    task = Task.GENERATE


class FlashGPT2ForEmbeddings(Model):
    """GPT-2 for embeddings."""

    task = Task.EMBED
