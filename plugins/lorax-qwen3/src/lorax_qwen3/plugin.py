"""Declares Qwen3 to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """Qwen3: a decoder with rotary positions, grouped queries, norms of queries and keys and a gated feed-forward block."""
    yield ArchitectureSpec(
        model_type="qwen3",
        summary="Qwen3 decoders, and the embedding models and rerankers made of them.",
        examples=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-Reranker-0.6B"),
        api=1,
        config="lorax_qwen3.config:Qwen3Config",
        backbone="lorax_qwen3.modeling:Qwen3Backbone",
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.TOKEN_CLASSIFICATION: "lorax_qwen3.modeling:Qwen3TokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_qwen3.modeling:Qwen3ScoreHead",
        },
        hf_architectures={
            "Qwen3ForCausalLM": Task.GENERATE,
            "Qwen3Model": Task.EMBED,
            "Qwen3ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "Qwen3ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
            "Qwen3ForQuestionAnswering": Task.EMBED,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings", "sliding_window"),
        cases="lorax_qwen3.cases:QWEN3",
    )
