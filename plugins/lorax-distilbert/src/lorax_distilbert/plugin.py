"""Declares DistilBERT to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """DistilBERT: half the layers of BERT and no token types, for embeddings and classification."""
    yield ArchitectureSpec(
        model_type="distilbert",
        summary="DistilBERT encoders, for embeddings and classification.",
        examples=(
            "sentence-transformers/msmarco-distilbert-base-v4",
            "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        ),
        api=1,
        config="lorax_distilbert.config:DistilBertConfig",
        backbone="lorax_distilbert.modeling:DistilBertBackbone",
        heads={
            Task.EMBED: "lorax_core.modeling:EmbeddingHead",
            Task.TOKEN_CLASSIFICATION: "lorax_core.modeling:TokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_distilbert.modeling:DistilBertSequenceClassificationHead",
        },
        hf_architectures={
            "DistilBertModel": Task.EMBED,
            "DistilBertForMaskedLM": Task.EMBED,
            "DistilBertForQuestionAnswering": Task.EMBED,
            "DistilBertForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "DistilBertForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.EMBED,
        causal=False,
        tiny_config={
            "vocab_size": 128,
            "dim": 128,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 256,
            "max_position_embeddings": 64,
        },
        tiny_variants={
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
