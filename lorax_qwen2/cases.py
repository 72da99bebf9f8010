"""What the conformance kit tests Qwen2 with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from typing import Any

from lorax_core.plugins import ArchitectureCases, Task

_WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}

QWEN2 = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "max_position_embeddings": 320,
    },
    variants={
        "tied": {"tie_word_embeddings": True},
        "every_head_its_keys": {"num_key_value_heads": 2},
        "grouped_queries": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        "wide_heads": {"head_dim": 128},
        "other_base": {"rope_theta": 1000000.0},
        "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "dynamic_rope": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 48},
        "yarn_rope": {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 40}},
        "llama3_rope": {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "windows": {**_WINDOWS, "max_window_layers": 0},
        "window_in_the_last_layer": {**_WINDOWS, "max_window_layers": 1},
        "window_by_layer_type": {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
        "window_switched_off": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        "bidirectional": {"is_causal": False},
        "bidirectional_windows": {**_WINDOWS, "max_window_layers": 0, "is_causal": False},
        "wide_epsilon": {"rms_norm_eps": 0.1},
        "gelu": {"hidden_act": "gelu"},
        "padding": {"pad_token_id": 0},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.GENERATE: "transformers:Qwen2ForCausalLM",
        Task.EMBED: "transformers:Qwen2Model",
        Task.TOKEN_CLASSIFICATION: "transformers:Qwen2ForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:Qwen2ForSequenceClassification",
    },
)
