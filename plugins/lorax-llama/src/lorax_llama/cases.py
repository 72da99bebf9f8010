"""What the conformance kit tests Llama and Mistral with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

LLAMA = ArchitectureCases(
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
        "mlp_bias": {"mlp_bias": True},
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
        Task.GENERATE: "transformers:LlamaForCausalLM",
        Task.EMBED: "transformers:LlamaModel",
        Task.TOKEN_CLASSIFICATION: "transformers:LlamaForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:LlamaForSequenceClassification",
    },
)

MISTRAL = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 320,
        "intermediate_size": 256,
        "sliding_window": 8,
    },
    variants={
        # The code is Llama's, whose variants are not all tested again.
        "other_num_key_value_heads": {"num_key_value_heads": 2},
        "other_rms_norm_eps": {"rms_norm_eps": 0.1},
        "tied": {"tie_word_embeddings": True},
        "no_window": {"sliding_window": None},
        "other_base": {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        "padding": {"pad_token_id": 0},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.GENERATE: "transformers:MistralForCausalLM",
        Task.EMBED: "transformers:MistralModel",
        Task.TOKEN_CLASSIFICATION: "transformers:MistralForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:MistralForSequenceClassification",
    },
)
