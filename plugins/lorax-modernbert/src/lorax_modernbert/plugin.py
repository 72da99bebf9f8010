"""Declares ModernBERT to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """ModernBERT: an encoder with rotary positions, windows in most layers, norms before its blocks, and gated feed-forward."""
    yield ArchitectureSpec(
        model_type="modernbert",
        summary="ModernBERT encoders, and the embedding models and rerankers made of them.",
        examples=(
            "answerdotai/ModernBERT-base",
            "nomic-ai/modernbert-embed-base",
            "Alibaba-NLP/gte-reranker-modernbert-base",
        ),
        api=1,
        config="lorax_modernbert.config:ModernBertConfig",
        backbone="lorax_modernbert.modeling:ModernBertBackbone",
        tasks=(Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.TOKEN_CLASSIFICATION: "lorax_modernbert.modeling:ModernBertTokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_modernbert.modeling:ModernBertSequenceClassificationHead",
        },
        hf_architectures={
            "ModernBertModel": Task.EMBED,
            "ModernBertForMaskedLM": Task.EMBED,
            "ModernBertForQuestionAnswering": Task.EMBED,
            "ModernBertForMultipleChoice": Task.EMBED,
            "ModernBertForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "ModernBertForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.EMBED,
        causal=False,
        features=("sliding_window",),
        cases="lorax_modernbert.cases:MODERNBERT",
    )
