"""What the conformance kit tests DistilBERT with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

DISTILBERT = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "dim": 128,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 256,
        "max_position_embeddings": 64,
    },
    variants={
        # Computed by transformers when it makes a model, but stored like learned ones.
        "sinusoidal_positions": {"sinusoidal_pos_embds": True},
        "tanh_gelu": {"activation": "gelu_new"},
        "relu": {"activation": "relu"},
        "three_heads": {"dim": 96, "n_heads": 3},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.EMBED: "transformers:DistilBertModel",
        Task.TOKEN_CLASSIFICATION: "transformers:DistilBertForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:DistilBertForSequenceClassification",
    },
)
