"""What the conformance kit tests GPT-NeoX with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

GPT_NEOX = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 320,
    },
    variants={
        "tied": {"tie_word_embeddings": True},
        "sequential": {"use_parallel_residual": False},
        "no_attention_bias": {"attention_bias": False},
        "half_rotary": {"rotary_pct": 0.5},
        "whole_rotary": {"rotary_pct": 1.0},
        # 19.2 dimensions of a head of 64: rounded down to 19, and up to whole pairs.
        "odd_rotary": {"rotary_pct": 0.3},
        "no_rotary": {"rotary_pct": 0.0},
        "other_base": {"rotary_emb_base": 500},
        "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "tanh_gelu": {"hidden_act": "gelu_new"},
        "fast_gelu": {"hidden_act": "gelu_fast"},
        "wide_epsilon": {"layer_norm_eps": 0.1},
        "padding": {"pad_token_id": 0},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.GENERATE: "transformers:GPTNeoXForCausalLM",
        Task.EMBED: "transformers:GPTNeoXModel",
        Task.TOKEN_CLASSIFICATION: "transformers:GPTNeoXForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:GPTNeoXForSequenceClassification",
    },
)
