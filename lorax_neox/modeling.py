"""GPT-NeoX: a decoder with partly rotary positions, whose attention and feed-forward blocks may read the same rows.

Decides what sets GPT-NeoX apart from core's decoder. Knows nothing of caches, files or adapters.
"""

from __future__ import annotations

from functools import partial

from lorax_core.modeling import (
    MLP,
    Decoder,
    DecoderLayer,
    LayerNorm,
    Model,
    ModelConfig,
    RotaryAttention,
    RotaryEmbedding,
    Task,
)
from lorax_core.weights import WeightMap
from lorax_neox.config import GPTNeoXConfig


class FlashGPTNeoXModel(Decoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        norm = partial(LayerNorm, hidden, config.layer_norm_eps)
        # All layers rotate the same way, so one set of frequencies is enough.
        rotary = RotaryEmbedding(hidden // heads, config.rope)
        layers = [
            DecoderLayer(
                RotaryAttention(hidden, heads, rotary=rotary, causal=True, bias=config.attention_bias),
                MLP(hidden, config.intermediate_size, config.hidden_act),
                norm,
                parallel=config.use_parallel_residual,
            )
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm())

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as GPTNeoXModel and its task models save them, with or without `gpt_neox.`; q, k, v are stored head by head."""
        names = {
            "embed_in": "embed_tokens",
            "embed_out": "lm_head",
            "final_layer_norm": "norm",
            "layers.*.attention.query_key_value": "layers.*.self_attn.qkv_proj",
            "layers.*.attention.dense": "layers.*.self_attn.o_proj",
            "layers.*.mlp.dense_h_to_4h": "layers.*.mlp.up_proj",
            "layers.*.mlp.dense_4h_to_h": "layers.*.mlp.down_proj",
        }
        # Causal masks and frequencies that old checkpoints hold.
        buffers = tuple(f"layers.*.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))
        return WeightMap(
            prefixes=("gpt_neox",),
            rename={f"{stored}.**": f"{name}.**" for stored, name in names.items()},
            # Rows are stored (head, q|k|v, dim), and core's fused layer has (q|k|v, head, dim). Adapters are rearranged, too.
            interleave={"layers.*.self_attn.qkv_proj": (config.num_attention_heads, 3)},
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            ignore=(*buffers, "qa_outputs.**"),
        )


class FlashGPTNeoXForCausalLM(Model):
    """GPT-NeoX that generates."""

    task = Task.GENERATE


class FlashGPTNeoXForEmbeddings(Model):
    """GPT-NeoX for embeddings."""

    task = Task.EMBED
