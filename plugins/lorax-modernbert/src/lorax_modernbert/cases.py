"""What the conformance kit tests ModernBERT with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

_FULL = {"rope_theta": 160000.0, "rope_type": "default"}
_SLIDING = {"rope_theta": 10000.0, "rope_type": "default"}

MODERNBERT = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        # One layer of all keys, two with a window, one of all keys.
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 192,
        "max_position_embeddings": 320,
        "local_attention": 16,
        # The way of pooling with more to it; adapters are tried on this configuration.
        "classifier_pooling": "mean",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        # Larger ones magnify rounding, so that float32 tells less.
        "initializer_range": 0.1,
    },
    variants={
        "first_row": {"classifier_pooling": "cls"},
        "windows": {"layer_types": ["sliding_attention"] * 4},
        "no_window": {"layer_types": ["full_attention"] * 4},
        "odd_window": {"layer_types": ["sliding_attention"] * 4, "local_attention": 7},
        "itself_alone": {"layer_types": ["sliding_attention"] * 4, "local_attention": 1},
        "every_second": {"global_attn_every_n_layers": 2},
        "one_layer": {"num_hidden_layers": 1},
        "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        "relu": {"hidden_activation": "relu", "classifier_activation": "tanh"},
        "wide_epsilon": {"norm_eps": 0.1},
        "other_bases": {
            "rope_parameters": {
                "full_attention": {**_FULL, "rope_theta": 40000.0},
                "sliding_attention": {**_SLIDING, "rope_theta": 500.0},
            }
        },
        "linear_rope": {
            "rope_parameters": {
                "full_attention": {**_FULL, "rope_type": "linear", "factor": 4.0},
                "sliding_attention": _SLIDING,
            }
        },
        "yarn_rope": {
            "rope_parameters": {
                "full_attention": {
                    **_FULL,
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "original_max_position_embeddings": 40,
                },
                "sliding_attention": _SLIDING,
            }
        },
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.EMBED: "transformers:ModernBertModel",
        Task.TOKEN_CLASSIFICATION: "transformers:ModernBertForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:ModernBertForSequenceClassification",
    },
)
