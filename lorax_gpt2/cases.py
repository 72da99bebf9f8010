"""What the conformance kit tests GPT-2 with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

GPT2 = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 320,
        # GPT-2's 50256 lies outside this vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    },
    variants={
        "untied": {"tie_word_embeddings": False},
        # Smaller weights: unscaled scores are so large that errors of rounding grow with each layer.
        "unscaled": {"scale_attn_weights": False, "initializer_range": 0.1},
        "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True},
        "upcast": {"reorder_and_upcast_attn": True},
        # Not 4 times the width, which is what a missing n_inner means.
        "narrow": {"n_inner": 96},
        "relu": {"activation_function": "relu"},
        "exact_gelu": {"activation_function": "gelu"},
        "wide_epsilon": {"layer_norm_epsilon": 0.1},
        "padding": {"pad_token_id": 0},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.GENERATE: "transformers:GPT2LMHeadModel",
        Task.EMBED: "transformers:GPT2Model",
        Task.TOKEN_CLASSIFICATION: "transformers:GPT2ForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:GPT2ForSequenceClassification",
    },
)
