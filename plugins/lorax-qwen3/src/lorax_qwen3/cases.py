"""What the conformance kit tests Qwen3 with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

QWEN3 = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 320,
        "intermediate_size": 256,
    },
    variants={
        "other_intermediate_size": {"intermediate_size": 512},
        "other_num_attention_heads": {"num_attention_heads": 4},
        "other_num_key_value_heads": {"num_key_value_heads": 2},
        "relu": {"hidden_act": "relu"},
        "other_rms_norm_eps": {"rms_norm_eps": 0.1},
        "tied": {"tie_word_embeddings": True},
        "attention_bias": {"attention_bias": True},
        "windows": {
            "sliding_window": 8,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "sliding_attention"],
        },
        "window_by_layer_type": {
            "sliding_window": 8,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "no_window": {"layer_types": ["full_attention", "full_attention"]},
        "window_in_the_last_layer": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        "window_switched_off": {
            "sliding_window": 8,
            "use_sliding_window": False,
            "layer_types": ["full_attention", "full_attention"],
        },
        "other_base": {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        "linear_rope": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}},
        "dynamic_rope": {
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 48,
        },
        "yarn_rope": {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 40,
            },
        },
        "llama3_rope": {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "padding": {"pad_token_id": 0},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.GENERATE: "transformers:Qwen3ForCausalLM",
        Task.EMBED: "transformers:Qwen3Model",
        Task.TOKEN_CLASSIFICATION: "transformers:Qwen3ForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:Qwen3ForSequenceClassification",
    },
)
