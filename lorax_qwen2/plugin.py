"""Declares Qwen2 to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """Qwen2: a causal decoder, for text and for embeddings."""
    yield ArchitectureSpec(
        model_type="qwen2",
        summary="Qwen2 and Qwen2.5 decoders, and the embedding models made of them.",
        examples=("Qwen/Qwen2.5-0.5B-Instruct", "Alibaba-NLP/gte-Qwen2-1.5B-instruct"),
        api=1,
        config="lorax_qwen2.config:Qwen2Config",
        backbone="lorax_qwen2.modeling:FlashQwen2Model",
        heads={
            Task.GENERATE: "lorax_core.modeling.heads:LanguageModelHead",
            Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
        },
        hf_architectures={"Qwen2ForCausalLM": Task.GENERATE, "Qwen2Model": Task.EMBED},
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings",),
        tiny_config={
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 256,
            "max_position_embeddings": 256,
        },
        tiny_variants={"tied": {"tie_word_embeddings": True}},
        references={Task.GENERATE: "transformers:Qwen2ForCausalLM", Task.EMBED: "transformers:Qwen2Model"},
    )
