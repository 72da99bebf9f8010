"""Declares Llama to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """Llama: a decoder with rotary positions, grouped queries and a gated feed-forward block."""
    yield ArchitectureSpec(
        model_type="llama",
        summary="Llama decoders.",
        api=1,
        config="lorax_llama.config:LlamaConfig",
        backbone="lorax_llama.modeling:LlamaBackbone",
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.TOKEN_CLASSIFICATION: "lorax_llama.modeling:LlamaTokenClassificationHead",
        },
        hf_architectures={
            "LlamaForCausalLM": Task.GENERATE,
            "LlamaModel": Task.EMBED,
            "LlamaForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "LlamaForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
            "LlamaForQuestionAnswering": Task.EMBED,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings",),
        cases="lorax_llama.cases:LLAMA",
    )
