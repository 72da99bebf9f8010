"""Declares DistilBert to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """DistilBert: an encoder with learned positions, no token types and norms after its residuals."""
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
        tasks=(Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.SEQUENCE_CLASSIFICATION: "lorax_distilbert.modeling:DistilBertSequenceClassificationHead",
        },
        hf_architectures={
            "DistilBertModel": Task.EMBED,
            "DistilBertForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "DistilBertForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
            "DistilBertForMaskedLM": Task.EMBED,
            "DistilBertForQuestionAnswering": Task.EMBED,
        },
        default_task=Task.EMBED,
        causal=False,
        cases="lorax_distilbert.cases:DISTILBERT",
    )
