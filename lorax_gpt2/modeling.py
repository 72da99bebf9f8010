"""GPT-2: a decoder over learned positions.

Decides what sets GPT-2 apart from core's decoder. Knows nothing of caches, files or adapters.
"""

from __future__ import annotations

from functools import partial

from lorax_core.modeling import MLP, Decoder, DecoderLayer, LayerNorm, Model, ModelConfig, SelfAttention, Task
from lorax_core.weights import WeightMap
from lorax_gpt2.config import GPT2Config


class FlashGPT2Model(Decoder):
    """A batch to hidden rows `[tokens, hidden]`.

    `reorder_and_upcast_attn` asks for scores in float32; every backend computes them so, whatever the dtype.
    """

    def __init__(self, config: GPT2Config) -> None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        norm = partial(LayerNorm, hidden, config.layer_norm_epsilon)
        layers = [
            DecoderLayer(
                SelfAttention(hidden, heads, causal=True, scale=config.scale(layer)),
                MLP(hidden, config.intermediate_size, config.activation_function),
                norm,
            )
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm(), max_positions=config.max_position_embeddings)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as GPT2Model and its task models save them, with or without `transformer.`; matrices are stored `[in, out]`."""
        names = {
            "wte": "embed_tokens",
            "wpe": "embed_positions",
            "ln_f": "norm",
            "h.*.ln_1": "layers.*.input_layernorm",
            "h.*.attn.c_attn": "layers.*.self_attn.qkv_proj",
            "h.*.attn.c_proj": "layers.*.self_attn.o_proj",
            "h.*.ln_2": "layers.*.post_attention_layernorm",
            "h.*.mlp.c_fc": "layers.*.mlp.up_proj",
            "h.*.mlp.c_proj": "layers.*.mlp.down_proj",
        }
        return WeightMap(
            prefixes=("transformer",),
            rename={f"{stored}.**": f"{name}.**" for stored, name in names.items()},
            # transformers' Conv1D stores [in, out]. Its biases and the rest of the model are as usual.
            transpose=("layers.*.self_attn.*.weight", "layers.*.mlp.*.weight"),
            # Only a default: a head that the file stores all the same wins over the tie.
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            # Causal masks that old checkpoints hold, and heads that are not supported.
            ignore=("h.*.attn.bias", "h.*.attn.masked_bias", "multiple_choice_head.**", "qa_outputs.**"),
        )


class FlashGPT2ForCausalLM(Model):
    """GPT-2 that generates."""

    task = Task.GENERATE


class FlashGPT2ForEmbeddings(Model):
    """GPT-2 for embeddings."""

    task = Task.EMBED
