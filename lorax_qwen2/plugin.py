"""Declares Qwen2 to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """Qwen2: a causal decoder, for text, embeddings and classification."""
    yield ArchitectureSpec(
        model_type="qwen2",
        summary="Qwen2 and Qwen2.5 decoders, and the embedding models made of them.",
        examples=("Qwen/Qwen2.5-0.5B-Instruct", "Alibaba-NLP/gte-Qwen2-1.5B-instruct", "NovaSearch/stella_en_1.5B_v5"),
        api=1,
        config="lorax_qwen2.config:Qwen2Config",
        backbone="lorax_qwen2.modeling:FlashQwen2Model",
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={Task.TOKEN_CLASSIFICATION: "lorax_qwen2.modeling:Qwen2TokenClassificationHead"},
        hf_architectures={
            "Qwen2ForCausalLM": Task.GENERATE,
            "Qwen2Model": Task.EMBED,
            "Qwen2ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "Qwen2ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings", "sliding_window"),
        cases="lorax_qwen2.cases:QWEN2",
    )
