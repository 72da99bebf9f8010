"""What the kit tests these with."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

GEMMA2 = ArchitectureCases(
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
        "untied": {"tie_word_embeddings": False},
        "windows": {"layer_types": ["sliding_attention", "sliding_attention"]},
    },
    references={
        Task.GENERATE: "transformers:Gemma2ForCausalLM",
        Task.EMBED: "transformers:Gemma2Model",
        Task.TOKEN_CLASSIFICATION: "transformers:Gemma2ForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:Gemma2ForSequenceClassification",
    },
    known_failures={},
)
OPT = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 320,
        "ffn_dim": 256,
    },
    variants={"untied": {"tie_word_embeddings": False}, "no_bias": {"enable_bias": False}},
    references={
        Task.GENERATE: "transformers:OPTForCausalLM",
        Task.EMBED: "transformers:OPTModel",
        Task.SEQUENCE_CLASSIFICATION: "transformers:OPTForSequenceClassification",
    },
)
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
    variants={"relu": {"hidden_act": "relu"}},
    references={
        Task.EMBED: "transformers:BertModel",
        Task.TOKEN_CLASSIFICATION: "transformers:BertForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:BertForSequenceClassification",
    },
)
