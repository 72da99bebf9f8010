"""What the conformance kit tests BERT with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

BERT = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
    },
    variants={
        "tanh_gelu": {"hidden_act": "gelu_new"},
        "quick_gelu": {"hidden_act": "quick_gelu"},
        "relu": {"hidden_act": "relu"},
        "one_token_type": {"type_vocab_size": 1},
        # So large that an epsilon which is not read from the file shows.
        "wide_epsilon": {"layer_norm_eps": 0.1},
        # No multiple of 8 or 16, for kernels that pad.
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.EMBED: "transformers:BertModel",
        Task.TOKEN_CLASSIFICATION: "transformers:BertForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:BertForSequenceClassification",
    },
)
