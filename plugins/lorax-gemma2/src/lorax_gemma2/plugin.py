"""Declares Gemma2 to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """Gemma2: a decoder with rotary positions, grouped queries, norms around both blocks and a gated feed-forward block."""
    yield ArchitectureSpec(
        model_type="gemma2",
        summary="Gemma 2 decoders, and the embedding and reward models made of them.",
        examples=("google/gemma-2-2b-it", "BAAI/bge-multilingual-gemma2"),
        api=1,
        config="lorax_gemma2.config:Gemma2Config",
        backbone="lorax_gemma2.modeling:Gemma2Backbone",
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.GENERATE: "lorax_gemma2.modeling:Gemma2LanguageModelHead",
            Task.TOKEN_CLASSIFICATION: "lorax_gemma2.modeling:Gemma2TokenClassificationHead",
        },
        hf_architectures={
            "Gemma2ForCausalLM": Task.GENERATE,
            "Gemma2Model": Task.EMBED,
            "Gemma2ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "Gemma2ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings", "sliding_window"),
        cases="lorax_gemma2.cases:GEMMA2",
    )
