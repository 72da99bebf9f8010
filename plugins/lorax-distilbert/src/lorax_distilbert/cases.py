"""What the conformance kit tests DistilBert with. Never imports torch; nothing but the kit imports it."""

from __future__ import annotations

from lorax_core.plugins import ArchitectureCases, Task

DISTILBERT = ArchitectureCases(
    tiny_config={
        "vocab_size": 128,
        "dim": 128,
        "n_layers": 2,
        "n_heads": 2,
        "max_position_embeddings": 320,
        "hidden_dim": 256,
    },
    variants={
        "other_n_heads": {"n_heads": 4},
        "other_hidden_dim": {"hidden_dim": 512},
        "relu": {"activation": "relu"},
        "odd_vocabulary": {"vocab_size": 131},
    },
    references={
        Task.EMBED: "transformers:DistilBertModel",
        Task.TOKEN_CLASSIFICATION: "transformers:DistilBertForTokenClassification",
        Task.SEQUENCE_CLASSIFICATION: "transformers:DistilBertForSequenceClassification",
    },
)
