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
        tasks=(Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={Task.SEQUENCE_CLASSIFICATION: "lorax_bert.modeling:BertSequenceClassificationHead"},
        hf_architectures={
            "BertModel": Task.EMBED,
            "BertForMaskedLM": Task.EMBED,
            "BertForPreTraining": Task.EMBED,
            "BertForNextSentencePrediction": Task.EMBED,
            "BertForQuestionAnswering": Task.EMBED,
            "BertForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "BertForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        # Its head needs no weights, so every BERT checkpoint can serve it.
        default_task=Task.EMBED,
        causal=False,
        features=("token_types",),
        cases="lorax_bert.cases:BERT",
    )
