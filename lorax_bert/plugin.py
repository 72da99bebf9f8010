"""Declares BERT to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """BERT: a bidirectional encoder, for embeddings and classification."""
    yield ArchitectureSpec(
        model_type="bert",
        summary="BERT encoders, among them most sentence-embedding models.",
        examples=("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-small-en-v1.5", "dslim/bert-base-NER"),
        api=1,
        config="lorax_bert.config:BertConfig",
        backbone="lorax_bert.modeling:FlashBertModel",
        heads={
            Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
            Task.TOKEN_CLASSIFICATION: "lorax_core.modeling.heads:TokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_bert.modeling:BertSequenceClassificationHead",
        },
        hf_architectures={
            "BertModel": Task.EMBED,
            "BertForMaskedLM": Task.EMBED,
            "BertForPreTraining": Task.EMBED,
            "BertForNextSentencePrediction": Task.EMBED,
            "BertForQuestionAnswering": Task.EMBED,
            "BertForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "BertForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.EMBED,
        causal=False,
        features=("token_types",),
        tiny_config={
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
        },
        tiny_variants={
            "tanh_gelu": {"hidden_act": "gelu_new"},
            "quick_gelu": {"hidden_act": "quick_gelu"},
            "relu": {"hidden_act": "relu"},
            "one_token_type": {"type_vocab_size": 1},
            "wide_epsilon": {"layer_norm_eps": 0.1},
            "odd_vocabulary": {"vocab_size": 131},
        },
        references={
            Task.EMBED: "transformers:BertModel",
            Task.TOKEN_CLASSIFICATION: "transformers:BertForTokenClassification",
            Task.SEQUENCE_CLASSIFICATION: "transformers:BertForSequenceClassification",
        },
    )
