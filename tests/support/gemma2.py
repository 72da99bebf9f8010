"""Gemma-2 as a newcomer would write it: norms of `1 + weight`, scaled embeddings, caps, windows in every other layer.

The tests' own, whose parts `broken` exchanges: nothing here leans on a package of plugins/.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import PositiveInt

from lorax_core.modeling import (
    Decoder,
    Embedding,
    GatedMLP,
    LanguageModelHead,
    ModelConfig,
    RMSNorm,
    Rope,
    RotaryAttention,
    RotaryEmbedding,
    read_rope,
)
from lorax_core.modeling.blocks import Block
from lorax_core.plugins import ArchitectureCases, ArchitectureSpec, Task
from lorax_core.weights import WeightMap


class Gemma2Config(ModelConfig):
    """Defaults are those of transformers."""

    own_head_dim: ClassVar[bool] = True

    num_key_value_heads: PositiveInt = 4
    head_dim: PositiveInt = 256
    intermediate_size: PositiveInt = 9216
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: PositiveInt = 8192
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...]
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    rope: Rope

    @classmethod
    def normalise(cls, raw):
        config = {"max_position_embeddings": 8192, **raw}
        if config.get("layer_types") is None:
            layers = range(config["num_hidden_layers"])
            config["layer_types"] = ["full_attention" if at % 2 else "sliding_attention" for at in layers]
        return {**config, "rope": read_rope(config)}

    @property
    def max_tokens(self):
        return self.max_position_embeddings


class ScaledEmbedding(Embedding):
    """Rows times the root of their width, which is rounded to the dtype of the rows first."""

    def compute(self, x, kernel):
        rows = super().compute(x, kernel)
        return rows * torch.tensor(self.out_features**0.5, dtype=rows.dtype)


class Gemma2Layer(Block):
    """Norms before and after both blocks."""

    def __init__(self, attention, mlp, norm):
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x, batch):
        attended = self.self_attn(self.input_layernorm(x, batch), batch)
        x = x + self.post_attention_layernorm(attended, batch)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x, batch), batch), batch)


class Gemma2Model(Decoder):
    embedding = ScaledEmbedding
    norm_class = RMSNorm

    def __init__(self, config):
        hidden = config.hidden_size
        norm = partial(self.norm_class, hidden, config.rms_norm_eps, offset=1.0)
        attention = partial(
            RotaryAttention,
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            rotary=RotaryEmbedding(config.head_dim, config.rope),
            causal=True,
            bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
        )
        layers = [
            Gemma2Layer(
                attention(window=config.sliding_window if kind == "sliding_attention" else None),
                GatedMLP(hidden, config.intermediate_size, config.hidden_activation),
                norm,
            )
            for kind in config.layer_types
        ]
        super().__init__(config, layers, norm())
        self.embed_tokens = self.embedding(config.vocab_size, hidden)

    @staticmethod
    def weight_map(config):
        return WeightMap(
            prefixes=("model",),
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "layers.*.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            },
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
        )


class Gemma2LanguageModelHead(LanguageModelHead):
    """Logits under the final cap."""

    def __init__(self, config):
        super().__init__(config)
        self.cap = config.final_logit_softcapping

    def forward(self, hidden, rows):
        logits = self.lm_head(hidden, rows)
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits.float()


SPEC = ArchitectureSpec(
    model_type="gemma2",
    summary="Gemma-2.",
    api=1,
    config="gemma2:Gemma2Config",
    backbone="gemma2:Gemma2Model",
    tasks=(Task.GENERATE, Task.EMBED),
    heads={Task.GENERATE: "gemma2:Gemma2LanguageModelHead"},
    hf_architectures={"Gemma2ForCausalLM": Task.GENERATE, "Gemma2Model": Task.EMBED},
    default_task=Task.GENERATE,
    causal=True,
    features=("tied_embeddings", "sliding_window"),
    cases="gemma2:CASES",
)

CASES = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "intermediate_size": 256,
        "max_position_embeddings": 256,
        "sliding_window": 8,
    },
    variants={
        "untied": {"tie_word_embeddings": False},
        "full": {"layer_types": ["full_attention", "full_attention"]},
        "sliding": {"layer_types": ["sliding_attention", "sliding_attention"]},
    },
    references={Task.GENERATE: "transformers:Gemma2ForCausalLM", Task.EMBED: "transformers:Gemma2Model"},
)
