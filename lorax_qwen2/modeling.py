"""Qwen2: pre-norm transformer blocks with rotary positions, grouped queries and a gated feed-forward layer.

Computes hidden rows of packed sequences. Knows nothing of caches, files or adapters.
"""

from __future__ import annotations

from torch import Tensor, nn

from lorax_core.kernels.elementwise import Angles
from lorax_core.modeling import (
    Attention,
    Batch,
    Embedding,
    GateUpLinear,
    Linear,
    Model,
    ModelConfig,
    QKVLinear,
    RMSNorm,
    RotaryEmbedding,
    Task,
    TokenClassificationHead,
    get_activation,
)
from lorax_core.weights import WeightMap
from lorax_qwen2.config import Qwen2Config


class Qwen2Attention(nn.Module):
    """Self-attention, causal unless the checkpoint says otherwise; only q, k and v have a bias."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = QKVLinear(config.hidden_size, heads, kv_heads, dim, bias=True)
        self.attention = Attention(heads, kv_heads, dim, causal=config.is_causal, window=config.window(layer))
        self.o_proj = Linear(heads * dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryEmbedding, angles: Angles, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj.project(x, batch)  # [tokens, heads | kv_heads, dim]
        attended = self.attention(rotary(q, angles), rotary(k, angles), v, batch)
        out: Tensor = self.o_proj(attended, batch)
        return out


class Qwen2MLP(nn.Module):
    """`down(act(gate) * up)`."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.gate_up_proj = GateUpLinear(config.hidden_size, config.intermediate_size)
        self.act = get_activation(config.hidden_act)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        gate, up = self.gate_up_proj.project(x, batch)  # [tokens, intermediate]
        out: Tensor = self.down_proj(self.act(gate) * up, batch)
        return out


class Qwen2Layer(nn.Module):
    """Attention and feed-forward, each on normalised input and added to what came in."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen2Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen2MLP(config)

    def forward(self, x: Tensor, rotary: RotaryEmbedding, angles: Angles, batch: Batch) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, batch), rotary, angles, batch)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x, batch), batch)
        return out


class FlashQwen2Model(nn.Module):
    """Embeddings, layers and the final norm: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.input_ids, batch)
        angles = self.rotary.angles(batch.position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, self.rotary, angles, batch)
        out: Tensor = self.norm(x, batch)
        return out

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as Qwen2Model and its task models save them, with or without `model.`."""
        return WeightMap(
            prefixes=("model",),
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "layers.*.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            },
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            # A model that sees both sides generates nothing, though its file may hold the head that it was trained from.
            ignore=() if config.generates else ("lm_head.weight",),
        )


class Qwen2TokenClassificationHead(TokenClassificationHead):
    """Labels of tokens. Qwen2 calls the layer as its sequence classifier's, which has no bias."""

    layer = "score"


class FlashQwen2ForCausalLM(Model):
    """Qwen2 that generates."""

    task = Task.GENERATE


class FlashQwen2ForEmbeddings(Model):
    """Qwen2 for embeddings."""

    task = Task.EMBED
